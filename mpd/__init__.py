"""mpd: one daemon per machine that averages a model over machines that come and go.

Strategy of the three rooms: `mpd` computes (no sockets, no clock, no threads), `mpd.daemon` waits (trio), `mpd.client`
blocks (standard library until the first tensor). Imports point only at this package.
"""

__version__ = "0.1.0"
