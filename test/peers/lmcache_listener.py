"""LMCache's own client as a listener: lmcache_listener.py URL MODEL

Each batch of the model's events is a line that begins with "RESULT ". The stream is cancelled when the input ends.
"""

import json
import sys
import threading

import zmq
from lmcache.v1.multiprocess.custom_types import KV_EVENT_CAPABILITY
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory


def main():
    url, model = sys.argv[1:]
    client = RequestClientFactory.create(url, context=zmq.Context())
    assert KV_EVENT_CAPABILITY in client.get_experimental().result(timeout=20)
    stream = client.subscribe_kv_events(77, model, 0, 64)

    def listen():
        for batch in stream:
            events = [
                {
                    "kind": event.kind,
                    "hashes": [bytes(block).hex() for block in event.block_hashes],
                    "parent": event.parent_block_hash and bytes(event.parent_block_hash).hex(),
                    "tokens": list(event.token_ids),
                }
                for event in batch.events
            ]
            answer({"enabled": batch.enabled, "lost": batch.lost, "events": events})

    listener = threading.Thread(target=listen)
    listener.start()
    sys.stdin.read()
    stream.close()
    listener.join(timeout=20)
    answer({"ended": not listener.is_alive(), "pong": client.ping(None).result(timeout=20)})
    client.close()


def answer(told):
    print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
