// An engine in a process of its own: stores prompts when told to, and can be held in mid-copy.
// Arguments: url, bytes of a chunk. Messages in: { first, chunks, holdAt? }; out: "ready", then the
// result of each. At `holdAt` it says { held } and goes on when a byte arrives on stdin.

import { readSync } from "node:fs";
import { Client, PrefixCache } from "../../dist/index.js";
import { payload, tokens } from "./prompts.mjs";

const [url = "", bytes = ""] = process.argv.slice(2);
const client = await Client.connect({ url });
const cache = await PrefixCache.open({
	via: client,
	identity: "faults",
	bytesPerChunk: Number(bytes),
});

process.on("message", async ({ first, chunks, holdAt }) => {
	const prompt = tokens(cache.chunkSize, first, chunks);
	const result = await cache.store(prompt, (chunk) => {
		if (chunk === holdAt) {
			process.send?.({ held: true });
			readSync(0, Buffer.alloc(1));
		}
		return payload(first, chunk, cache.bytesPerChunk);
	});
	process.send?.({ ...result, failure: result.failure?.code });
});
process.on("disconnect", async () => {
	await cache.close();
	await client.close();
});
process.send?.("ready");
