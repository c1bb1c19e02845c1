"""A life of vLLM with LMCache's connector, driven by lines: vllm_engine.py MODEL PORT [KEY=VALUE ...]

PORT 0 is an engine without the connector. Each line of the input is a JSON object: {"tokens": N, "seed": S} asks
for the first token after a prompt of N tokens, "generate" for so many, "salt" for a tenant's cache. Each answer
is a line that begins with "RESULT ". The engine ends with its input.
"""

import json
import sys
import time


def prompt(tokens, seed):
    return [(i * 7919 + seed * 104729) % 31000 + 3 for i in range(tokens)]


def main():
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    model, port, *settings = sys.argv[1:]
    connector = {}
    if port != "0":
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": int(port)}
        for setting in settings:
            name, value = setting.split("=")
            extra[f"lmcache.mp.{name}"] = float(value)
        connector["kv_transfer_config"] = KVTransferConfig(
            kv_connector="LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=extra
        )
    begun = time.perf_counter()
    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
        enforce_eager=True,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.2,
        **connector,
    )
    first = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    engine.generate({"prompt_token_ids": prompt(64, 999)}, first, use_tqdm=False)  # warms up
    answer({"ready": time.perf_counter() - begun})
    for line in sys.stdin:
        asked = json.loads(line)
        ids = prompt(asked["tokens"], asked["seed"])
        if "tail" in asked:  # the last tokens are another's
            ids[-asked["tail"] :] = prompt(asked["tail"], asked["seed"] + 7)
        request = {"prompt_token_ids": ids}
        if "salt" in asked:
            request["cache_salt"] = asked["salt"]
        if asked.get("reset"):
            engine.reset_prefix_cache()
        sampling = SamplingParams(max_tokens=asked.get("generate", 1), temperature=0, detokenize=False)
        begun = time.perf_counter()
        output = engine.generate(request, sampling, use_tqdm=False)[0]
        answer({
            "seconds": time.perf_counter() - begun,
            "cached": output.num_cached_tokens,
            "tokens": list(output.outputs[0].token_ids),
        })


def answer(told):
    print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
