"""LMCache's own client in the mode lmcache_driven against a server: what comes back is compared byte by byte, then timed.

    python lmcache_driven.py URL cpu|gpu [--isolated] [--first N] [--rounds N] [--shape SPEC]

On a GPU with either form of its memory: handles of torch's storages and CUDA's events, or with --isolated the driver's
own handles and LMCache's counters. One line of JSON: {"chunks", "chunk_bytes", "store_gbps", "load_gbps", "copy_gbps":
one copy of as many bytes from and to page-locked memory, beside it}, medians without the first, and each round's time.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from lmcache.cli.commands.bench.server_bench.client import ServerBenchClient
from lmcache.cli.commands.bench.server_bench.config import BenchConfig
from lmcache.v1.platform.ipc_policy import set_isolated_ipc

# 32 layers of 8 heads of 128 elements, two bytes each: 32 MiB a chunk of 256 tokens.
SHAPE = "(2,1024,16,8,128):float16:32"
TOKENS = 2047  # and one before them that tells the prompts apart


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("mode", choices=["cpu", "gpu"])
    parser.add_argument("--isolated", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="prompts of another run are others")
    parser.add_argument("--shape", default=SHAPE)
    args = parser.parse_args()
    set_isolated_ipc(args.isolated)
    config = BenchConfig(
        rpc_url=args.url,
        http_url="",
        mode=args.mode,
        transfer_mode="lmcache_driven",
        tp_size=1,
        use_mla=False,
        num_tokens=TOKENS,
        kvcache_shape_spec=args.shape,
        num_blocks=1024,
        block_size=16,
    )
    client = ServerBenchClient(config, lambda line: print(line, file=sys.stderr))
    client.start()
    try:
        print(json.dumps(run(client, args)))
    finally:
        client.close()


def run(client, args):
    tensors = list(client._workers[0].kv_caches.values())
    synchronize = torch.cuda.synchronize if args.mode == "gpu" else (lambda: None)
    stored, loaded = [], []
    for sequence in range(args.first, args.first + args.rounds + 1):  # the first opens the memory and is not timed
        request = client.create_request(sequence, f"{sequence} cold", "cold")
        assert client.lookup(request).hit_chunks == 0
        for tensor in tensors:
            tensor.copy_(torch.rand(tensor.shape, device=tensor.device).to(tensor.dtype))
        synchronize()
        was = [tensor.clone() for tensor in tensors]
        began = time.monotonic()
        result = client.store(request, 0, request.num_full_tokens)
        stored.append(time.monotonic() - began)
        assert result.succeeded, result
        client.end_session(request)

        # What the server writes must be the request's blocks and no others.
        for tensor in tensors:
            tensor.fill_(7)
        synchronize()
        request = client.create_request(sequence, f"{sequence} warm", "warm")
        assert client.lookup(request).is_full_hit
        began = time.monotonic()
        result = client.retrieve(request, 0, request.num_full_tokens)
        loaded.append(time.monotonic() - began)
        assert result.succeeded, result
        client.end_session(request)
        blocks = range(request.block_offset, request.block_offset + request.num_blocks)
        for tensor, before in zip(tensors, was):
            axis = tensor.shape.index(1024)
            expected = torch.full_like(tensor, 7)
            expected.narrow(axis, blocks.start, len(blocks)).copy_(
                before.narrow(axis, blocks.start, len(blocks))
            )
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))

    block_bytes = sum(tensor.nbytes for tensor in tensors) // 1024
    whole = block_bytes * request.num_blocks
    gbps = lambda seconds: round(whole / statistics.median(seconds[1:]) / 1e9, 2)
    report = {
        "chunks": request.total_chunks,
        "chunk_bytes": whole // request.total_chunks,
        "store_gbps": gbps(stored),
        "load_gbps": gbps(loaded),
        "store_ms": [round(1000 * seconds, 1) for seconds in stored],
        "load_ms": [round(1000 * seconds, 1) for seconds in loaded],
    }
    if args.mode == "gpu":
        report["copy_gbps"] = [gbps(seconds) for seconds in one_copy(whole, args.rounds)]
        report["device"] = torch.cuda.get_device_name()
    return report


def one_copy(size, rounds):
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for to, source in ((host, device), (device, host)):
        seconds = []
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            began = time.monotonic()
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
        yield seconds


if __name__ == "__main__":
    main()
