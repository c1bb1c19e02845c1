// Stores and loads of chunks between a GPU and a server of its own process, through TypeScript, client and server; the
// engine's side of the GPU is the simulator's. To be compared with what copy_cuda of kvferry-copy measures there.

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { root } from "../../scripts/setup.mjs";
import { addonOf, buildSimulator, simulatorRoot } from "../../scripts/simulator-build.mjs";
import { arrays, BLOCK_BYTES, BLOCKS, OBJECT, POOL, Stack } from "./copy.mjs";
import { median } from "./rows.mjs";

const PAIRS = 51;

/**
 * GB/s; the reference is one copy of as many bytes from and to page-able memory of the process.
 *
 * @returns {Promise<import("./rows.mjs").Row[]>}
 */
export default async function copyCuda() {
	await buildSimulator();
	const addon = createRequire(join(root, "package.json"))(addonOf(simulatorRoot));
	/** @type {typeof import("../../ts/index.js")} */
	const kvferry = await import(pathToFileURL(join(simulatorRoot, "dist", "index.js")).href);
	/** @type {bigint} */
	let stream;
	try {
		stream = addon.simulatorCudaStream();
	} catch (error) {
		console.error(`not run on a GPU: ${error instanceof Error ? error.message : error}`);
		return [];
	}
	const byteLength = 2 * BLOCKS * BLOCK_BYTES;
	const kv = arrays(() => ({ pointer: addon.simulatorCudaAllocate(byteLength), byteLength }));
	const stack = await Stack.open("never", { kvferry, kv, place: { device: "cuda", stream } });
	const rows = [];
	for (const chunks of [1, 4]) {
		const bytes = chunks * OBJECT;
		const large = {
			pointer: addon.simulatorCudaAllocate(bytes),
			host: new Uint8Array(bytes).fill(1),
		};
		/** @type {Record<"store" | "load" | "out" | "in", number[]>} */
		const rates = { store: [], load: [], out: [], in: [] };
		for (let round = 0; round < POOL / bytes + 2; round++) {
			const operation = stack.op(chunks);
			fill(operation);
			await stack.store(operation);
			const other = stack.elsewhere(operation);
			await stack.load(other);
			if (!fill(other, true)) {
				throw new Error("what was loaded is not what was stored, so times mean nothing");
			}
		}
		for (let pair = 0; pair < PAIRS; pair++) {
			const operation = stack.op(chunks);
			rates.store.push(bytes / (await stack.store(operation)) / 1e6);
			rates.load.push(bytes / (await stack.load(stack.elsewhere(operation))) / 1e6);
			const start = performance.now();
			addon.simulatorCudaRead(large.pointer, large.host);
			const middle = performance.now();
			addon.simulatorCudaWrite(large.pointer, large.host);
			addon.simulatorCudaRead(large.pointer, large.host.subarray(0, 1));
			rates.out.push(bytes / (middle - start) / 1e6);
			rates.in.push(bytes / (performance.now() - middle) / 1e6);
		}
		addon.simulatorCudaFree(large.pointer);
		for (const [what, plain] of /** @type {const} */ ([
			["store", "out"],
			["load", "in"],
		])) {
			const [ours, reference] = [median(rates[what]), median(rates[plain])];
			const name = `${bytes / 2 ** 20} MiB: ${what} of GPU memory through server and client ÷ one copy of memory that is not pinned`;
			rows.push({ name, ours, reference, unit: "GB/s", ratio: ours / reference });
		}
	}
	await stack.close();
	return rows;

	/** Fills an operation's blocks, or tells whether they hold it. */
	function fill(/** @type {ReturnType<Stack["op"]>} */ { prompt, op }, check = false) {
		const block = new Uint32Array(BLOCK_BYTES / 4);
		const bytes = new Uint8Array(block.buffer);
		return Object.values(kv).every(({ pointer }, layer) =>
			[0, 1].every((plane) =>
				(op.blockIds[0] ?? []).every((number, n) => {
					const at = pointer + BigInt((plane * BLOCKS + number) * BLOCK_BYTES);
					const value = prompt * 1_000_000 + layer * 10_000 + plane * 5000 + n;
					if (check) {
						addon.simulatorCudaRead(at, bytes);
						return block.every((word) => word === value);
					}
					block.fill(value);
					addon.simulatorCudaWrite(at, bytes);
					return true;
				}),
			),
		);
	}
}
