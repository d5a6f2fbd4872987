"""What is said before there is a link, message by message. `test_peers.py` has the talks between real daemons."""

import pytest
import trio
import trio.testing
from identities import node_id

from mpd.daemon.handshake import CallBook, Talk, printable, why
from mpd.errors import PeerError
from mpd.messages import Ping


async def test_messages_are_read_one_at_a_time_and_no_byte_further() -> None:
    near, far = trio.testing.memory_stream_pair()
    talk = Talk(near)
    await talk.send(Ping())
    await talk.send(Ping(answer=True))
    await near.send_all(b"rest")
    assert [await Talk(far).receive(), await Talk(far).receive()] == [Ping(), Ping(answer=True)]
    assert await far.receive_some() == b"rest"


@pytest.mark.parametrize("sent", [b"", b"\x01", b"\x05\0\0\0ab", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x01\0\0\0\xc1"])
async def test_whatever_else_comes_blames_the_peer(sent: bytes) -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(sent)
    await near.send_eof()
    with pytest.raises(PeerError):
        await Talk(far).receive()


def test_what_peers_write_is_made_fit_for_a_terminal() -> None:
    assert printable("a\x1b[31m\nb") == "a?[31m?b"
    assert len(printable("x" * 10_000)) == 200


def test_reasons_are_found_below_what_trio_wraps_around_them() -> None:
    refused = ConnectionRefusedError(111, "Connection refused")
    all_failed = OSError("all attempts to connect to nowhere failed")
    all_failed.__cause__ = ExceptionGroup("attempts", [refused])
    assert why(all_failed) == "Connection refused"
    assert "closed the connection" in why(trio.BrokenResourceError())
    assert why(PeerError("it did this")) == "it did this"


def test_calls_are_forgotten_with_the_last_who_takes_part() -> None:
    book = CallBook()
    with book.calls_with(node_id(1)) as one, book.calls_with(node_id(1)) as other:
        assert one is other
        assert one.users == 2
    with book.calls_with(node_id(1)) as later:
        assert later is not one
