"""What the peers' own code takes, asked by bench/node/peers.mjs in lines of JSON, each answered by one:
peers.py hashes | plans | chunks | copies URL. Times are nanoseconds."""

import itertools
import json
import sys
import time

TOKENS = 32 * 1024


def tokens():
    return [(at * 7919 + 13) % 128_256 for at in range(TOKENS)]


def timed(call, times):
    begun = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - begun) / times


def hashes():
    """vLLM's block hashes of a request, as its engine computes them: {"algorithm", "times"}."""
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    request = Request("request", tokens(), SamplingParams(max_tokens=1), None)

    def answer(asked):
        function = get_hash_fn_by_name(asked["algorithm"])
        try:
            kv_cache_utils.init_none_hash(function)
        except ModuleNotFoundError as error:
            return {"skipped": str(error)}
        hasher = kv_cache_utils.get_request_block_hasher(16, function)
        return {"hashes": [part.hex() for part in hasher(request)], "ns": timed(lambda: hasher(request), asked["times"])}

    return answer


def chunks():
    """LMCache's chunk hashes, as its server computes them: {"algorithm", "times"}."""
    from lmcache.v1.multiprocess.token_hasher import TokenHasher

    ids = tokens()

    def answer(asked):
        hasher = TokenHasher(256, asked["algorithm"])
        told = [part.hex() for part in hasher.compute_chunk_hashes(ids)]
        return {"hashes": told, "ns": timed(lambda: hasher.compute_chunk_hashes(ids), asked["times"])}

    return answer


BLOCK, BLOCKS, LAYERS = 16, 256, 32
CHUNK_BLOCKS = 16


def copies(url):
    """LMCache's own client, as the worker of its connector uses it, on KV arrays as in copy.mjs: {"prompt", "chunks",
    "do": "store" | "load"}. What is loaded goes to other blocks and is compared."""
    import torch
    import zmq
    from lmcache.utils import EngineType
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
    from lmcache.v1.multiprocess.group_view import EngineGroupInfo
    from lmcache.v1.multiprocess.transfer_context import EngineDrivenTransferContext
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

    timeout = 30
    client = RequestClientFactory.create(url, context=zmq.Context())
    kv = {
        f"layer.{layer}": torch.randint(0, 30_000, (2, BLOCKS, BLOCK, 8, 128), dtype=torch.int16).view(torch.bfloat16)
        for layer in range(LAYERS)
    }
    context = EngineDrivenTransferContext(77, client)
    groups = [EngineGroupInfo(engine_group_id=0, layer_indices=tuple(range(LAYERS)), tokens_per_block=BLOCK)]
    hints = {"kv_layout": "NHD"}
    context.register(kv, "theirs", 1, CHUNK_BLOCKS, timeout, hints, groups, EngineType.VLLM)
    if type(context.engine_driven_context).__name__ != "EngineDrivenContextShm":
        raise SystemExit("LMCache's client does not use shared memory")

    def blocks(chunks, shift):
        return [(at + shift) * 97 % BLOCKS for at in range(chunks * CHUNK_BLOCKS)]

    def answer(asked):
        prompt, chunks, what = asked["prompt"], asked["chunks"], asked["do"]
        end = chunks * CHUNK_BLOCKS * BLOCK
        ids = tuple((prompt * 7919 + at) % 1_000_003 for at in range(end))
        request = f"{what} {prompt}"

        def key(worker):
            return IPCCacheServerKey("theirs", 1, worker, ids, 0, end, request, num_kv_readers=1)

        source = blocks(chunks, prompt)
        target = source if what == "store" else blocks(chunks, prompt + BLOCKS // 2)
        if what == "load":
            client.lookup(key(None), 1).result(timeout)
            while (found := client.query_prefetch_status(request).result(timeout)) is None:
                pass
            if found != chunks:
                raise SystemExit(f"{found} of {chunks} chunks found")
        submit = context.submit_store if what == "store" else context.submit_retrieve
        begun = time.perf_counter_ns()
        done = submit(request, key(0), kv, [target], context.create_recorded_event(), CHUNK_BLOCKS).result(timeout)
        ns = time.perf_counter_ns() - begun
        client.end_session(request).result(timeout)
        if not done:
            raise SystemExit(f"no {what}")
        same = all(torch.equal(layer[:, source].view(torch.int16), layer[:, target].view(torch.int16)) for layer in kv.values())
        if what == "load":
            for layer in kv.values():
                layer[:, target] += 1  # not what the next load has to bring
        return {"ns": ns, "same": same}

    return answer


def main():
    part, *arguments = sys.argv[1:]
    answer = {"hashes": hashes, "chunks": chunks, "copies": copies}[part](*arguments)
    print(json.dumps({"ready": part}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
