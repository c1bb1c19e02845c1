"""libzmq as a peer of our server, one check a run: zmtp_peer.py tcp://HOST:PORT CHECK

A check that fails raises, so the exit code tells.
"""

import hashlib
import mmap
import os
import sys

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

PATIENCE_MS = 10_000
MODEL = "peer"
INSTANCE = 0x1122334455667788
LAYERS, HIDDEN = 2, 8
OPERATIONS = {
    "lookup": 8,
    "query_prefetch_status": 9,
    "wait_prefetch_status": 10,
    "free_lookup_locks": 12,
    "end_session": 13,
    "register": 14,
    "unregister": 15,
    "prepare_store": 16,
    "commit_store": 17,
    "prepare_retrieve": 18,
    "commit_retrieve": 19,
    "get_chunk_size": 21,
    "ping": 22,
    "noop": 24,
}

encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode


class Peer:
    """A DEALER that waits for each answer."""

    def __init__(self, url, **options):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.monitor = self.socket.get_monitor_socket()
        self.socket.connect(url)
        self.uid = 0

    def send(self, operation, *parameters):
        self.uid += 1
        frames = [self.uid, OPERATIONS[operation], *parameters]
        self.socket.send_multipart([encode(frame) for frame in frames])
        return self.uid

    def receive(self):
        assert self.socket.poll(PATIENCE_MS), "no answer"
        uid, operation, *result = (decode(frame) for frame in self.socket.recv_multipart())
        assert len(result) <= 1
        return uid, operation, (result or [None])[0]

    def call(self, operation, *parameters):
        uid = self.send(operation, *parameters)
        assert (answer := self.receive())[:2] == (uid, OPERATIONS[operation]), answer
        return answer[2]

    def wait_for(self, *events):
        """The next of these events of the connection."""
        while self.monitor.poll(PATIENCE_MS):
            event = recv_monitor_message(self.monitor)["event"]
            if event in events:
                return event
        raise AssertionError(f"none of {events} happened")


def key(tokens, request, end, worker=None, salt=""):
    return {
        "model_name": MODEL,
        "world_size": 1,
        "worker_id": worker,
        "token_ids": tokens,
        "start": 0,
        "end": end,
        "request_id": request,
        "cache_salt": salt,
        "request_configs": {"tag": "peer"},
        "num_kv_readers": 1,
    }


def register(peer, chunk_size):
    return peer.call(
        "register",
        {
            "instance_id": INSTANCE,
            "model_name": MODEL,
            "world_size": 1,
            "block_size": 16,
            "num_layers": LAYERS,
            "hidden_dim_size": HIDDEN,
            "dtype_str": "bfloat16",
            "use_mla": False,
            "num_physical_slots": chunk_size,
        },
    )


def content(index, length):
    """Bytes that differ from chunk to chunk."""
    return hashlib.shake_128(bytes([index])).digest(length)


def handshake(url):
    peer = Peer(url)
    assert peer.call("get_chunk_size") == 256
    assert peer.call("noop") == "OK"
    assert peer.call("ping", None) is True
    peer.wait_for(zmq.EVENT_HANDSHAKE_SUCCEEDED)


def heartbeats(url):
    # Each PING has to be answered within a second, or libzmq ends the connection.
    peer = Peer(url, HEARTBEAT_IVL=50, HEARTBEAT_TIMEOUT=1000, HEARTBEAT_TTL=5000)
    peer.wait_for(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    assert not peer.monitor.poll(2500), "the connection did not last"
    assert peer.call("noop") == "OK"


def same_identity_twice(url):
    first = Peer(url, IDENTITY=b"same")
    assert first.call("noop") == "OK"
    second = Peer(url, IDENTITY=b"same")
    assert second.call("noop") == "OK"
    assert first.call("noop") == "OK"


def plain_is_refused(url):
    plain = Peer(url, PLAIN_USERNAME=b"user", PLAIN_PASSWORD=b"password")
    plain.send("noop")
    plain.wait_for(zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    assert not plain.socket.poll(0)
    assert Peer(url).call("noop") == "OK"


def plain_with_the_token(url):
    peer = Peer(url, PLAIN_USERNAME=b"peer", PLAIN_PASSWORD=os.environ["PEER_TOKEN"].encode())
    assert peer.call("noop") == "OK"
    peer.wait_for(zmq.EVENT_HANDSHAKE_SUCCEEDED)


def plain_with_another_token_is_refused(url):
    token = os.environ["PEER_TOKEN"].encode()
    peers = []  # all at once: their monitors have names that may come again
    for wrong in (b"x", token[1:], token.upper()):
        peer = Peer(url, PLAIN_USERNAME=b"peer", PLAIN_PASSWORD=wrong)
        peers.append(peer)
        peer.send("noop")
        ended = peer.wait_for(
            zmq.EVENT_DISCONNECTED,
            zmq.EVENT_HANDSHAKE_SUCCEEDED,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_FAILED_AUTH,
        )
        assert ended != zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert not peer.socket.poll(0)


def null_is_refused(url):
    peer = Peer(url)
    peer.send("noop")
    peer.wait_for(zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    assert not peer.socket.poll(0)
    plain_with_the_token(url)


def another_socket_type_is_refused(url):
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.linger = 0
    monitor = socket.get_monitor_socket()
    socket.connect(url)
    events = []
    while not {zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL} & set(events):
        assert monitor.poll(PATIENCE_MS), "it is not cut"
        events.append(recv_monitor_message(monitor)["event"])
    assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in events
    assert Peer(url).call("noop") == "OK"


def store_and_retrieve(url):
    worker, scheduler = Peer(url), Peer(url)
    chunk = worker.call("get_chunk_size")
    pool = register(worker, chunk)
    tokens = list(range(70_000, 70_000 + 3 * chunk + 5))
    end = 3 * chunk

    def lookup(request, salt=""):
        assert scheduler.call("lookup", key(tokens, request, end, salt=salt), 1) is None
        return scheduler.call("wait_prefetch_status", request, 5.0)

    with open(os.path.join("/dev/shm", pool["shm_name"]), "r+b") as file:
        memory = mmap.mmap(file.fileno(), pool["pool_size"])
    assert lookup("cold") == 0
    assert scheduler.call("end_session", "cold") is None
    writing = key(tokens, "cold", end, worker=0)
    context = worker.call("prepare_store", writing, INSTANCE)["context"]
    assert context["chunk_indices"] == [0, 1, 2]
    for index, slot in zip(context["chunk_indices"], context["slots"], strict=True):
        assert slot["shape"] == [2, LAYERS, chunk, HIDDEN] and slot["dtype"] == "bfloat16"
        assert slot["length"] == 2 * LAYERS * chunk * HIDDEN * 2 and slot["offset"] % 4096 == 0
        memory[slot["offset"] : slot["offset"] + slot["length"]] = content(index, slot["length"])
    assert worker.call("commit_store", writing, INSTANCE, b"") is True

    assert lookup("other tenant", salt="tenant") == 0
    assert lookup("warm") == 3
    first = key(tokens, "warm", chunk)
    assert scheduler.call("free_lookup_locks", first, 1) is None
    reading = {**key(tokens, "warm", end, worker=0), "start": chunk}
    granted = worker.call("prepare_retrieve", reading, INSTANCE)
    assert granted["success"] and granted["data"] == b""
    for index, slot in enumerate(granted["context"]["slots"], 1):
        read = memory[slot["offset"] : slot["offset"] + slot["length"]]
        assert read == content(index, slot["length"])
    assert worker.call("commit_retrieve", reading, INSTANCE) is True
    # The first one's lease was given back.
    again = worker.call("prepare_retrieve", {**first, "worker_id": 0}, INSTANCE)
    assert again == {"success": False, "data": b"", "context": {}}
    assert scheduler.call("end_session", "warm") is None
    assert worker.call("unregister", INSTANCE) is None


def pipelined(url):
    peer = Peer(url)
    uids = [peer.send("ping", INSTANCE) for _ in range(10_000)]
    assert [peer.receive() for _ in uids] == [(uid, OPERATIONS["ping"], True) for uid in uids]


def long_prompt(url):
    peer = Peer(url)
    chunk = peer.call("get_chunk_size")
    register(peer, chunk)
    end = 4096 * chunk
    tokens = list(range(end))  # 1,048,576 tokens, a message of 5 MB
    assert peer.call("lookup", key(tokens, "long", end), 1) is None
    assert peer.call("query_prefetch_status", "long") == 0
    assert peer.call("end_session", "long") is None


CHECKS = {
    check.__name__: check
    for check in (
        handshake,
        heartbeats,
        same_identity_twice,
        plain_is_refused,
        plain_with_the_token,
        plain_with_another_token_is_refused,
        null_is_refused,
        another_socket_type_is_refused,
        store_and_retrieve,
        pipelined,
        long_prompt,
    )
}

if __name__ == "__main__":
    CHECKS[sys.argv[2]](sys.argv[1])
    os._exit(0)  # without waiting for libzmq's threads
