"""What the peers' own code takes, asked by bench/node/peers.mjs in lines of JSON, each answered by one:
peers.py hashes | chunks | plans | copies URL. Times are nanoseconds where nothing else is said."""

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


def plans():
    """Steps of vLLM's built-in LMCacheMPConnector, of the loads of plan.mjs: {"count", "prompt", "chunks", "steps", "turns"}.
    Microseconds of GetStoreMetadata for all of a step's requests ("plan") and of build_connector_meta ("metadata")."""
    from statistics import median
    from types import SimpleNamespace

    from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector import (
        LMCacheMPConnectorUpstream as Connector,
        LMCacheMPRequestMetadata as Metadata,
    )
    from vllm.v1.request import RequestStatus
    from vllm.v1.utils import ConstantList

    short, longest, prompt = 1024, 128 * 1024 + 512, TOKENS
    nothing = lambda *_, **__: None
    adapter = SimpleNamespace(
        maybe_submit_lookup_request=nothing,
        check_lookup_result=lambda _: 0,
        cleanup_lookup_result=nothing,
        free_lookup_locks=nothing,
        report_block_allocations=nothing,
        num_blocks_per_chunk=lambda: 16,
    )

    class Load:
        def __init__(self, asked):
            self.prompt = asked.get("prompt", False)
            self.connector = object.__new__(Connector)  # without a server
            self.connector.scheduler_adapter = adapter
            self.connector.request_trackers = {}
            self.connector.vllm_block_size = 16
            self.ids = list(range(max(short + 512, prompt)))
            self.computed = {}
            for index in range(asked["count"]):
                computed = short + (index >> 2 if asked.get("chunks") else index % 16)
                name = f"request-{index}"
                self.computed[name] = computed
                self.add(name, short + 512, list(self.blocks(index, 0, computed)))
                self.connector.build_connector_meta(self.output([name], [computed], []))

        def blocks(self, index, start, end):
            first = prompt // 16 + index * longest // 16
            return range(first + start // 16, first + -(-end // 16))

        def add(self, name, length, block_ids):
            request = SimpleNamespace(
                request_id=name,
                cache_salt=None,
                all_token_ids=ConstantList(self.ids[:length]),
                block_hashes=[b"hash"] * (length // 16),
                status=RequestStatus.WAITING,
            )
            self.connector.get_num_new_matched_tokens(request, 0)
            self.connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (block_ids,)), 0)

        def output(self, new, tokens, new_blocks):
            cached = [] if new_blocks == [] else list(self.computed)
            return SimpleNamespace(
                scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
                scheduled_cached_reqs=SimpleNamespace(req_ids=cached, new_block_ids=new_blocks, resumed_req_ids=set()),
                num_scheduled_tokens=dict(zip(new, tokens)) | dict.fromkeys(cached, 1),
            )

        def new_blocks(self):
            return [
                (list(self.blocks(index, computed, computed + 1)),) if computed % 16 == 0 else None
                for index, computed in enumerate(self.computed.values())
            ]

        def step(self, whole):
            new = ["prompt"] if self.prompt else []
            if self.prompt:
                self.add("prompt", prompt, list(range(prompt // 16)))
            output = self.output(new, [prompt], self.new_blocks())
            if whole:
                begun = time.perf_counter_ns()
                metas = self.connector.build_connector_meta(output).requests
                ns = time.perf_counter_ns() - begun
            else:
                trackers = [self.connector.request_trackers[name] for name in [*new, *self.computed]]
                for tracker, blocks in zip(trackers[len(new) :], output.scheduled_cached_reqs.new_block_ids):
                    tracker.append_block_ids(blocks[0] if blocks else [])
                for tracker in trackers:
                    tracker.increase_num_scheduled_tokens(output.num_scheduled_tokens[tracker.request_id])
                get = Metadata.GetStoreMetadata
                begun = time.perf_counter_ns()
                metas = [get(tracker, 16, 16) for tracker in trackers]
                ns = time.perf_counter_ns() - begun
                metas = [meta for meta in metas if meta is not None]
            for name in self.computed:
                self.computed[name] += 1
            self.connector.request_trackers.pop("prompt", None)
            for meta in metas:
                if meta.op.token_ids[: meta.op.end] != self.ids[: meta.op.end]:
                    raise SystemExit("an operation has other tokens than its request")
            return ns / 1000, [[meta.request_id, meta.op.start, meta.op.end, meta.op.block_ids] for meta in metas]

    def answer(asked):
        told = {}
        for whole in (False, True):
            us = []
            for turn in range(asked["turns"] + 1):
                load = Load(asked)
                steps = [load.step(whole) for _ in range(asked["steps"] - 1)]
                us = us + [step for step, _ in steps] if turn > 0 else us
            told["metadata" if whole else "plan"] = median(us) if us else None
            if told.setdefault("planned", [ops for _, ops in steps]) != [ops for _, ops in steps]:
                raise SystemExit("the connector plans otherwise than its parts")
        if asked["turns"] > 0:
            del told["planned"]
        return told

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

    def blocks(chunks, first):
        return [(first + at) * 97 % BLOCKS for at in range(chunks * CHUNK_BLOCKS)]

    def answer(asked):
        prompt, chunks, what = asked["prompt"], asked["chunks"], asked["do"]
        end = chunks * CHUNK_BLOCKS * BLOCK
        ids = tuple((prompt * 7919 + at) % 1_000_003 for at in range(end))
        request = f"{what} {prompt}"

        def key(worker):
            return IPCCacheServerKey("theirs", 1, worker, ids, 0, end, request, num_kv_readers=1)

        first = prompt * chunks * CHUNK_BLOCKS
        source = blocks(chunks, first)
        target = source if what == "store" else blocks(chunks, first + BLOCKS // 2)
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
    answer = {"hashes": hashes, "chunks": chunks, "plans": plans, "copies": copies}[part](*arguments)
    print(json.dumps({"ready": part}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
