// What planning a scheduler's step costs, against a limit of 100 µs and vLLM's own figures: in one call of the
// tracker table, and in the connector's call around it, which reads the requests and makes the workers'
// metadata. All loads take turns within one run, and every step's plan is checked.

import { isDeepStrictEqual } from "node:util";
import { load, median } from "./rows.mjs";

const { SchedulerConnector, TrackerTable } = await load();

/** Microseconds for a step of 1,024 requests, one of which stores 32k tokens. */
const LIMIT = 100;
// Microseconds of one call of vLLM 0.33.0's LMCacheMPConnector, GetStoreMetadata: medians of 5 on 2 cores of an
// Intel Xeon, CPython 3.11.7. Of a request of 32k tokens with nothing to store, and of one that stores them all.
const VLLM_IDLE = 0.674;
const VLLM_STORE = 154.3;

const BLOCK = 16;
const CHUNK = 256;
export const REQUESTS = 1024;
const SHORT = 1024;
const LONG = 128 * 1024;
/** Requests decode fewer tokens than a chunk has; then others take their places. */
export const STEPS = 200;
const TURNS = 5;

/** A prompt that one step stores whole. */
const PROMPT = 32 * 1024;
const PROMPT_TOKENS = range(0, PROMPT);
const PROMPT_BLOCKS = range(0, PROMPT / BLOCK);
/** Longer than any request. */
const TOKENS = LONG + 2 * CHUNK;

/**
 * So many requests decode after prompts of so many tokens (default 1,024) and store nothing, or four of 1,024 a
 * chunk each. Beside them a prompt is stored or not, and allocations are reported or not.
 *
 * @typedef {{ count: number, tokens?: number, chunks?: boolean, prompt?: boolean, told?: boolean }} Shape
 */

/**
 * Microseconds of a step, or of one request in it.
 *
 * @returns {Promise<import("./rows.mjs").Row[]>}
 */
export default async function plan() {
	const idle = { count: REQUESTS };
	const store = { count: REQUESTS - 1, prompt: true };
	const alone = { count: 0, prompt: true };
	const plans = measure(TableLoad, {
		idle,
		store,
		storeLong: { ...store, tokens: LONG },
		alone,
		few: { count: REQUESTS / 4 },
		many: { count: REQUESTS * 4 },
	});
	const metas = measure(ConnectorLoad, {
		idle,
		store,
		storeLong: { ...store, tokens: LONG },
		alone,
	});
	const chunks = measure(ConnectorLoad, {
		short: { ...idle, chunks: true },
		long: { ...idle, chunks: true, tokens: LONG },
	});
	const told = measure(ConnectorLoad, {
		short: { ...idle, told: true },
		long: { ...idle, told: true, tokens: LONG },
	});
	const vllm = (REQUESTS - 1) * VLLM_IDLE + VLLM_STORE;
	return [
		row("plan: 1,024 requests, one stores 32k tokens ÷ limit", plans.store, LIMIT),
		row("plan: 1,024 requests, one stores 32k tokens ÷ vLLM", plans.store, vllm),
		row("plan: 32k tokens stored, alone ÷ vLLM", plans.alone, VLLM_STORE),
		row("plan: one of 1,024 with nothing to store ÷ vLLM", plans.idle / REQUESTS, VLLM_IDLE),
		row("plan: the first row's, of 128k tokens each ÷ of 1k", plans.storeLong, plans.store),
		row("plan: one of 4,096 ÷ of 1,024", plans.many / 4 / REQUESTS, plans.idle / REQUESTS),
		row("plan: one of 256 ÷ of 1,024", (plans.few * 4) / REQUESTS, plans.idle / REQUESTS),
		row("metadata: 1,024 requests, one stores 32k tokens ÷ limit", metas.store, LIMIT),
		row("metadata: 1,024 requests, one stores 32k tokens ÷ vLLM", metas.store, vllm),
		row("metadata: 32k tokens stored, alone ÷ vLLM", metas.alone, VLLM_STORE),
		row("metadata: one of 1,024 with nothing to store ÷ vLLM", metas.idle / REQUESTS, VLLM_IDLE),
		row("metadata: one stores 32k, others have 128k tokens ÷ 1k", metas.storeLong, metas.store),
		row("metadata: four store a chunk, all have 128k ÷ 1k", chunks.long, chunks.short),
		row("metadata: allocations told, all have 128k ÷ 1k", told.long, told.short),
	];
}

function row(
	/** @type {string} */ name,
	/** @type {number} */ ours,
	/** @type {number} */ reference,
) {
	return { name, ours, reference, unit: "µs", ratio: ours / reference };
}

/**
 * The median step of each load, in microseconds.
 *
 * @template {string} Name
 * @param {new (shape: Shape) => { step(): number }} Load
 * @param {Record<Name, Shape>} shapes
 */
export function measure(Load, shapes, turns = TURNS) {
	const names = /** @type {Name[]} */ (Object.keys(shapes));
	const times = names.map(() => /** @type {number[]} */ ([]));
	for (let turn = 0; turn <= turns; turn++) {
		const loads = names.map((name) => new Load(shapes[name]));
		for (let step = 1; step < STEPS; step++) {
			loads.forEach((load, i) => {
				const us = load.step();
				if (turn > 0) {
					times[i]?.push(us); // compiled by then
				}
			});
		}
	}
	return /** @type {Record<Name, number>} */ (
		Object.fromEntries(names.map((name, i) => [name, median(times[i] ?? [])]))
	);
}

/**
 * What each step of a load plans: request, first and last token, blocks.
 *
 * @param {new (shape: Shape) => { step(): number, planned: unknown[] }} Load
 * @param {Shape} shape
 */
export function planned(Load, shape) {
	const load = new Load(shape);
	return Array.from({ length: STEPS - 1 }, () => {
		load.step();
		return load.planned;
	});
}

/** A request that decodes: a token in each step, and a new block when the last one is full. */
class Decoding {
	#firstBlock;
	/** Its tokens whose KV is computed. */
	computed;

	constructor(
		/** @type {Shape} */ { tokens = SHORT, chunks = false },
		/** @type {number} */ index,
	) {
		this.requestId = `request-${index}`;
		this.#firstBlock = PROMPT_BLOCKS.length + (index * TOKENS) / BLOCK;
		this.computed = tokens + (chunks ? index >> 2 : index % BLOCK);
	}

	/** The blocks of a range of its tokens. */
	blocks(/** @type {number} */ start, /** @type {number} */ end) {
		return range(this.#firstBlock + start / BLOCK, this.#firstBlock + Math.ceil(end / BLOCK));
	}

	get allBlocks() {
		return this.blocks(0, this.computed);
	}

	/** The blocks that the next step gives it. */
	get newBlocks() {
		return this.computed % BLOCK === 0 ? this.blocks(this.computed, this.computed + 1) : [];
	}

	/** Ends a step. Returns what it was to store: one chunk, when its last token is computed. */
	stored() {
		this.computed += 1;
		const [start, end] = [this.computed - CHUNK, this.computed];
		return end % CHUNK > 0 ? [] : [{ start, end, blockIds: [this.blocks(start, end)] }];
	}
}

const PROMPT_STORED = { start: 0, end: PROMPT, blockIds: [PROMPT_BLOCKS] };

/** Steps of a tracker table. */
export class TableLoad {
	/** Of the last step, as {@link planned} tells it. @type {unknown[]} */
	planned = [];
	#table = new TrackerTable({ chunkSize: CHUNK, blockSize: BLOCK });
	#prompt;
	#decoding;

	constructor(/** @type {Shape} */ shape) {
		this.#prompt = shape.prompt ?? false;
		this.#decoding = Array.from({ length: shape.count }, (_, i) => {
			const request = new Decoding(shape, i);
			const { requestId, computed, allBlocks: blockIds } = request;
			const counts = { numTokens: computed, numScheduledTokens: computed };
			const numStoredTokens = computed - (computed % CHUNK);
			const state = "READY";
			const { handle } = this.#table.add({
				requestId,
				...counts,
				numStoredTokens,
				state,
				blockIds,
			});
			return { request, handle };
		});
	}

	step() {
		const handles = this.#decoding.map(({ handle }) => handle);
		const scheduled = handles.map(() => 1);
		const tokens = this.#decoding.map(({ request }) => request.computed + 1);
		const newBlocks = this.#decoding.map(({ request }) => request.newBlocks);
		if (this.#prompt) {
			const [requestId, blockIds, state] = [
				"prompt",
				PROMPT_BLOCKS,
				/** @type {const} */ ("READY"),
			];
			const { handle } = this.#table.add({ requestId, numTokens: PROMPT, blockIds, state });
			handles.push(handle);
			scheduled.push(PROMPT);
			tokens.push(PROMPT);
			newBlocks.push([]);
		}
		let end = 0;
		const step = {
			handles: Uint32Array.from(handles),
			scheduledTokens: Uint32Array.from(scheduled),
			numTokens: Uint32Array.from(tokens),
			blockOffsets: Uint32Array.of(0, ...newBlocks.map((ids) => (end += ids.length))),
			blockIds: Uint32Array.from(newBlocks.flat()),
		};

		const start = performance.now();
		const plan = this.#table.plan(step);
		const us = (performance.now() - start) * 1e3;

		const expected = this.#decoding.flatMap(({ request, handle }) =>
			request.stored().map((op) => ({ handle, ...op })),
		);
		if (this.#prompt) {
			const handle = /** @type {number} */ (handles.at(-1));
			expected.push({ handle, ...PROMPT_STORED });
			this.#table.remove("prompt");
		}
		const direction = "STORE";
		const names = new Map(this.#decoding.map(({ request, handle }) => [handle, request.requestId]));
		this.planned = [...plan].map(({ handle, start, end, blockIds }) => {
			return [names.get(handle) ?? "prompt", start, end, blockIds.flat()];
		});
		check(
			[...plan],
			expected.map((op) => ({ ...op, direction, skipFirstNTokens: 0 })),
		);
		return us;
	}
}

/** Steps of a connector. */
export class ConnectorLoad {
	/** Of the last step, as {@link planned} tells it. @type {unknown[]} */
	planned = [];
	/** New blocks that the step has told. */
	#told = 0;
	#tells;
	#connector;
	#prompt;
	#decoding;

	constructor(/** @type {Shape} */ shape) {
		/** @type {import("../../ts/index.js").SchedulerAdapter} */
		const adapter = {
			chunkSize: CHUNK,
			maybeSubmitLookupRequest() {},
			checkLookupResult: () => 0,
			cleanupLookupResult() {},
			freeLookupLocks() {},
			endSession() {},
		};
		this.#tells = shape.told ?? false;
		if (this.#tells) {
			adapter.reportBlockAllocations = (allocations) => {
				this.#told = allocations.flatMap(({ newBlockIds }) => newBlockIds[0] ?? []).length;
			};
		}
		this.#connector = new SchedulerConnector({ adapter, blockSize: BLOCK });
		this.#prompt = shape.prompt ?? false;
		const allTokenIds = range(0, (shape.tokens ?? SHORT) + 2 * CHUNK);
		this.#decoding = Array.from({ length: shape.count }, (_, i) => {
			const request = new Decoding(shape, i);
			const { requestId, computed } = request;
			const engine = { requestId, allTokenIds, numComputedTokens: 0 };
			this.#connector.getNumNewMatchedTokens(engine, 0);
			this.#connector.updateStateAfterAlloc(engine, request.allBlocks, 0);
			this.#connector.buildConnectorMeta({
				scheduledNewReqs: [{ requestId }],
				scheduledCachedReqs: [],
				numScheduledTokens: { [requestId]: computed },
			});
			return { request, engine };
		});
	}

	step() {
		const requestId = "prompt";
		const prompt = { requestId, allTokenIds: PROMPT_TOKENS, numComputedTokens: 0 };
		const isNew = this.#prompt ? [{ requestId }] : [];
		if (this.#prompt) {
			this.#connector.getNumNewMatchedTokens(prompt, 0);
			this.#connector.updateStateAfterAlloc(prompt, PROMPT_BLOCKS, 0);
		}
		let newBlocks = 0;
		const cached = this.#decoding.map(({ request, engine }) => {
			engine.numComputedTokens = request.computed;
			const blocks = request.newBlocks;
			newBlocks += blocks.length;
			return { requestId: request.requestId, newBlockIds: blocks.length > 0 ? blocks : null };
		});
		/** @type {[string, number][]} */
		const scheduled = cached.map(({ requestId }) => [requestId, 1]);
		const output = {
			scheduledNewReqs: isNew,
			scheduledCachedReqs: cached,
			numScheduledTokens: Object.fromEntries([...scheduled, [requestId, PROMPT]]),
		};
		this.#told = 0;

		const start = performance.now();
		const { requests } = this.#connector.buildConnectorMeta(output);
		const us = (performance.now() - start) * 1e3;

		const expected = this.#decoding.flatMap(({ request, engine }) =>
			request.stored().map((op) => ({ ...engine, ...op })),
		);
		if (this.#prompt) {
			expected.unshift({ ...prompt, ...PROMPT_STORED });
			this.#connector.requestFinished(prompt);
			this.#connector.updateConnectorOutput({ finishedSending: [requestId] }); // its id is used again
		}
		this.planned = requests.map(({ requestId, op: { start, end, blockIds } }) => {
			return [requestId, start, end, blockIds.flat()];
		});
		check([this.#told], [this.#tells ? newBlocks : 0]);
		check(
			requests.map(({ op: { tokenIds, ...op }, ...rest }) => ({ ...rest, ...op })),
			expected.map(({ requestId, start, end, blockIds }) => {
				const range = { start, end, blockIds, skipFirstNTokens: 0 };
				return { requestId, direction: "STORE", cacheSalt: "", ...range };
			}),
		);
		check(
			requests.map(({ op }) => op.tokenIds.length),
			expected.map(({ allTokenIds }) => allTokenIds.length),
		);
		for (const { op } of requests) {
			if (!op.tokenIds.every((token, i) => token === i)) {
				throw new Error("an operation has other tokens than its request");
			}
		}
		return us;
	}
}

function range(/** @type {number} */ from, /** @type {number} */ to) {
	return Array.from({ length: to - from }, (_, i) => from + i);
}

function check(/** @type {unknown[]} */ found, /** @type {unknown[]} */ expected) {
	if (!isDeepStrictEqual(found, expected)) {
		throw new Error("a step's plan is not what it must be, so times mean nothing");
	}
}
