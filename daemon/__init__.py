"""The room that waits: sockets, timers, shared memory and the DHT around the pure machines of `mpd`."""
