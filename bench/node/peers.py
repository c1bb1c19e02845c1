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


def main():
    part, *arguments = sys.argv[1:]
    answer = {"hashes": hashes, "chunks": chunks}[part](*arguments)
    print(json.dumps({"ready": part}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
