// An engine with a GPU's KV memory, in a process of its own. Arguments: the package's folder, url. Messages in:
// [what, ...arguments], one at a time; out: "ready", then { result } or { error } of each.

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { addonOf } from "../../scripts/simulator-build.mjs";

/** @typedef {{ pointer: bigint, byteLength: number }} Pointer */

const [home = "", url = ""] = process.argv.slice(2);
/** @type {typeof import("../../ts/index.js")} */
const kvferry = await import(pathToFileURL(join(home, "dist", "index.js")).href);
/** Where it is the simulator's: an engine's side of a GPU. */
const addon = createRequire(import.meta.url)(addonOf(home));

const client = await kvferry.Client.connect({ url });
/** The first store. @type {Promise<import("../../ts/native-binding.js").PagedTransfer>} */
const storing = new Promise((resolve) => {
	const openWorker = client.openWorker.bind(client);
	client.openWorker = async (...place) => {
		const worker = await openWorker(...place);
		const storeBlocks = worker.storeBlocks.bind(worker);
		worker.storeBlocks = (...range) => {
			const store = storeBlocks(...range);
			resolve(store);
			return store;
		};
		return worker;
	};
});
const adapter = kvferry.createWorkerAdapter({ via: client, modelName: "m", saveTimeoutMs: 60_000 });
const connector = new kvferry.WorkerConnector({ adapter });

/** @param {"STORE" | "RETRIEVE"} direction @param {number[]} blocks @param {number[]} tokenIds */
function bind(direction, blocks, tokenIds) {
	const range = { tokenIds, start: 0, end: tokenIds.length, skipFirstNTokens: 0 };
	const op = { ...range, blockIds: [blocks] };
	const requests = [{ requestId: direction, direction, op, cacheSalt: "" }];
	connector.bindConnectorMetadata({ loadAsync: false, requests });
	connector.startLoadKv();
}

/** @param {Pointer} array */
function read({ pointer, byteLength }) {
	const bytes = new Uint8Array(byteLength);
	addon.simulatorCudaRead(pointer, bytes);
	return bytes;
}

/** @type {Record<string, (...given: any[]) => unknown>} */
const calls = {
	stream: () => addon.simulatorCudaStream(),
	/** @param {number} bytes */
	allocate: (bytes) => addon.simulatorCudaAllocate(bytes),
	/** @param {bigint} pointer @param {Uint8Array} bytes */
	write: (pointer, bytes) => addon.simulatorCudaWrite(pointer, bytes),
	read,
	/** @param {bigint} pointer */
	free: (pointer) => addon.simulatorCudaFree(pointer),
	violations: () => addon.simulatorCudaViolations(),
	/** @type {typeof connector.registerKvCaches} */
	register: (caches, layout) => connector.registerKvCaches(caches, layout),
	/**
	 * Stores; computes other things in the blocks as soon as it may.
	 *
	 * @param {number[]} blocks @param {number[]} tokenIds @param {[bigint, Uint8Array][]} then
	 */
	async store(blocks, tokenIds, then = []) {
		bind("STORE", blocks, tokenIds);
		await connector.waitForSave();
		for (const [pointer, bytes] of then) {
			addon.simulatorCudaWrite(pointer, bytes);
		}
		for (let ended = new Set(["STORE"]); !connector.getFinished(ended)[0].has("STORE"); ) {
			ended = new Set();
			await new Promise((resolve) => setImmediate(resolve));
		}
		return { stored: adapter.storedChunks, failure: adapter.failure?.message };
	},
	/**
	 * Ends the process as soon as a part is stored.
	 *
	 * @param {number} code @param {number[]} blocks @param {number[]} tokenIds
	 */
	async exitInStore(code, blocks, tokenIds) {
		bind("STORE", blocks, tokenIds);
		connector.waitForSave();
		await (await storing).copied(1);
		process.exit(code);
	},
	/** The same for a load. @param {number} code @param {number[]} blocks @param {number[]} tokenIds @param {string} first */
	async exitInLoad(code, blocks, tokenIds, first) {
		bind("RETRIEVE", blocks, tokenIds);
		await connector.waitForLayerLoad(first);
		process.exit(code);
	},
	/**
	 * Loads, and reads each layer as soon as it is there.
	 *
	 * @param {number[]} blocks @param {number[]} tokenIds @param {[string, Pointer | undefined][]} layers
	 */
	async load(blocks, tokenIds, layers) {
		bind("RETRIEVE", blocks, tokenIds);
		const there = [];
		for (const [name, array] of layers) {
			await connector.waitForLayerLoad(name);
			there.push(array && read(array));
		}
		await connector.waitForSave();
		await adapter.waitForLoads();
		const wrong = [...connector.getBlockIdsWithLoadErrors()];
		return { there, wrong, failure: adapter.failure?.message };
	},
	/** Shuts down while a store is under way. @param {number[]} blocks @param {number[]} tokenIds */
	async shutdownInStore(blocks, tokenIds) {
		bind("STORE", blocks, tokenIds);
		connector.waitForSave();
		await storing;
		await connector.shutdown();
		return adapter.failure?.message;
	},
	shutdown: () => connector.shutdown(),
	async end() {
		await client.close();
		process.disconnect();
	},
};

process.on("message", async (/** @type {[string, ...unknown[]]} */ [what, ...given]) => {
	try {
		const result = await calls[what]?.(...given);
		if (process.connected) {
			process.send?.({ result });
		}
	} catch (error) {
		const { code, message } = /** @type {import("../../ts/index.js").KvferryError} */ (error);
		process.send?.({ error: { code, message } });
	}
});
process.send?.("ready");
