import { describe, expect, it } from "vitest";
import {
	type EngineRequest,
	type ErrorCode,
	KvferryError,
	type LoadStoreOp,
	type SchedulerAdapter,
	SchedulerConnector,
	type SchedulerConnectorOptions,
} from "../../ts/index.js";

const CHUNK = 64;
const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

/** An adapter that finds what a test says, and keeps what it was asked. */
function cache(found: () => number | null) {
	const calls: [name: string, ...rest: unknown[]][] = [];
	const adapter: SchedulerAdapter = {
		chunkSize: CHUNK,
		carriesSalt: true,
		maybeSubmitLookupRequest: (id, _tokens, options) =>
			calls.push(["lookup", id, options?.cacheSalt]),
		checkLookupResult: () => found(),
		cleanupLookupResult: (id) => calls.push(["cleanup", id]),
		freeLookupLocks: (id, _tokens, start, end, options) =>
			calls.push(["free", id, start, end, options?.cacheSalt]),
		endSession: (id) => calls.push(["end", id]),
	};
	return { adapter, calls };
}

function open(found: () => number | null, options: Partial<SchedulerConnectorOptions> = {}) {
	const { adapter, calls } = cache(found);
	return { connector: new SchedulerConnector({ adapter, ...options }), calls };
}

function request(requestId: string, tokens: number, rest: Partial<EngineRequest> = {}) {
	return { ...rest, requestId, allTokenIds: range(0, tokens) };
}

const idle = { scheduledNewReqs: [], scheduledCachedReqs: [], numScheduledTokens: {} };

describe("a scheduler's connector", () => {
	it("does not wait for the cache, then loads a hit and stores what follows", () => {
		let found: number | null = null;
		const { connector, calls } = open(() => found);
		const a = request("a", 150);
		expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([null, true]);
		found = 64;
		expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([64, true]);
		connector.updateStateAfterAlloc(a, range(0, 4), 64);
		const [load] = connector.buildConnectorMeta(idle).requests;
		expect(load).toMatchObject({ direction: "RETRIEVE", op: { start: 0, end: 64 } });
		connector.updateStateAfterAlloc(a, range(0, 10), 0);
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledNewReqs: [a],
			numScheduledTokens: { a: 86 },
		});
		expect(requests).toEqual([
			{
				requestId: "a",
				direction: "STORE",
				cacheSalt: "",
				op: {
					tokenIds: Uint32Array.from(a.allTokenIds),
					start: 64,
					end: 128,
					blockIds: [range(4, 8)],
					skipFirstNTokens: 0,
				},
			},
		]);
		expect(connector.requestFinished(a)).toEqual([true, null]);
		expect(connector.tracker("a")).toBeUndefined();
		expect(calls.at(-1)).toEqual(["end", "a"]);
	});

	it("leaves the last token of a prompt that is stored whole to be computed", () => {
		const { connector } = open(() => 128);
		expect(connector.getNumNewMatchedTokens(request("a", 128), 0)).toEqual([127, true]);
		expect(connector.getNumNewMatchedTokens(request("b", 128), 127)).toEqual([0, false]);
	});

	it("stores what the engine had cached itself though the cache had nothing", () => {
		const { connector } = open(() => 0);
		const a = request("a", 150);
		connector.getNumNewMatchedTokens(a, 112);
		connector.updateStateAfterAlloc(a, range(0, 10), 0);
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledNewReqs: [a],
			numScheduledTokens: { a: 38 },
		});
		expect(requests.map(({ op }) => [op.start, op.end])).toEqual([[0, 128]]);
	});

	it("stores nothing that is not computed yet where both hits count the same tokens, as their sum would", () => {
		const { connector } = open(() => 64);
		const a = request("a", 320);
		connector.getNumNewMatchedTokens(a, 64);
		connector.updateStateAfterAlloc(a, range(0, 20), 0);
		// 64 + 16 tokens are there; with the sum of the hits it would be 144, and a chunk of garbage.
		expect(stored(connector, a, 16)).toEqual([]);
		expect(stored(connector, a, 48, false)).toEqual([[64, 128]]);
	});

	it("stores what the engine had cached itself beyond the cache's hit, which alone would leave it out for ever", () => {
		const { connector } = open(() => 64);
		const a = request("a", 320);
		connector.getNumNewMatchedTokens(a, 128);
		connector.updateStateAfterAlloc(a, range(0, 20), 0);
		expect(stored(connector, a, 1)).toEqual([[64, 128]]);
	});

	it("counts no stored block twice when it asks again after a failed allocation", () => {
		const { connector } = open(() => 64);
		const a = request("a", 150);
		for (let i = 0; i < 3; i++) {
			connector.getNumNewMatchedTokens(a, 0);
		}
		expect(connector.tracker("a")?.numStoredTokens).toBe(64);
	});

	it("gives leases back for chunks that the engine has itself, or computes after all", () => {
		const { connector, calls } = open(() => 128);
		const [has, computes] = [request("a", 150), request("b", 150)];
		connector.getNumNewMatchedTokens(has, 80);
		connector.updateStateAfterAlloc(has, range(0, 8), 48);
		connector.getNumNewMatchedTokens(computes, 0);
		connector.updateStateAfterAlloc(computes, range(0, 8), 0);
		expect(calls.filter(([name]) => name === "free")).toEqual([
			["free", "a", 0, 80, undefined],
			["free", "b", 0, 128, undefined],
		]);
		expect(connector.buildConnectorMeta(idle).requests).toHaveLength(1);
	});

	it("begins anew after a preemption", () => {
		const { connector } = open(() => 64);
		const a = request("a", 150);
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 10), 0);
		const again = { ...a, status: "PREEMPTED" };
		expect(connector.getNumNewMatchedTokens(again, 0)).toEqual([0, false]);
		connector.updateStateAfterAlloc(again, range(20, 30), 0);
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledCachedReqs: [{ requestId: "a", newBlockIds: range(20, 30), resumed: true }],
			numScheduledTokens: { a: 150 },
		});
		expect(requests.map(({ op }) => op.blockIds)).toEqual([[range(20, 28)]]);
	});

	it("computes a request whose load failed instead of waiting for it again", () => {
		const { connector } = open(() => 64);
		const a = request("a", 150);
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 4), 64);
		connector.buildConnectorMeta(idle);
		const reset = { ...a, numComputedTokens: 0 };
		expect(connector.getNumNewMatchedTokens(reset, 0)).toEqual([0, false]);
		expect(connector.getNumNewMatchedTokens(reset, 0)).toEqual([0, false]);
		connector.updateStateAfterAlloc(reset, range(0, 10), 0);
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledNewReqs: [a],
			numScheduledTokens: { a: 150 },
		});
		expect(requests.map(({ direction, op }) => [direction, op.end])).toEqual([["STORE", 128]]);
	});

	it("plans by LMCache's rules when told: of the prompt only, up to a limit", () => {
		const limits = [
			[{ planner: "lmcache" }, {}, 128],
			[{ planner: "lmcache", saveDecodeCache: true }, {}, 192],
			[{ planner: "lmcache" }, { maxOffloadTokens: 100 }, 64],
			[{}, {}, 192],
		] as const;
		for (const [options, rest, end] of limits) {
			const { connector } = open(() => 0, options);
			const a = request("a", 150, rest);
			connector.getNumNewMatchedTokens(a, 0);
			a.allTokenIds.push(...range(150, 200));
			connector.updateStateAfterAlloc(a, range(0, 13), 0);
			const { requests } = connector.buildConnectorMeta({
				...idle,
				scheduledNewReqs: [a],
				numScheduledTokens: { a: 200 },
			});
			expect(requests.map(({ op }) => op.end)).toEqual([end]);
		}
	});

	it("tells the router how much came from the cache, when it asks", () => {
		const { connector } = open(() => 128);
		const key = "num_lmcache_extra_cached_tokens";
		const a = request("a", 150, { kvTransferParams: { [key]: 1 } });
		connector.getNumNewMatchedTokens(a, 16);
		expect(connector.requestFinished(a)).toEqual([true, { [key]: 112 }]);
		expect(connector.requestFinished(request("b", 1, { kvTransferParams: { x: 1 } }))).toEqual([
			false,
			{},
		]);
	});
});

describe("the salt of a request", () => {
	it("is dropped at no hop: lookup, leases given back, load and store", () => {
		const { connector, calls } = open(() => 128);
		const a = request("a", 200, { cacheSalt: "tenant" });
		connector.getNumNewMatchedTokens(a, 64);
		connector.updateStateAfterAlloc(a, range(0, 13), 64);
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledNewReqs: [a],
			numScheduledTokens: { a: 72 },
		});
		expect(requests.map(({ direction, cacheSalt }) => [direction, cacheSalt])).toEqual([
			["RETRIEVE", "tenant"],
			["STORE", "tenant"],
		]);
		expect(calls).toEqual([
			["lookup", "a", "tenant"],
			["cleanup", "a"],
			["free", "a", 0, 64, "tenant"],
		]);
		expect(connector.tracker("a")?.cacheSalt).toBe("tenant");
	});

	it("changes nothing when it is absent, null or empty", () => {
		for (const cacheSalt of [undefined, null, ""]) {
			const { connector, calls } = open(() => 64);
			connector.getNumNewMatchedTokens(request("a", 150, { cacheSalt }), 0);
			expect(calls).toEqual([["lookup", "a", undefined]]);
		}
	});

	it("is refused where a request has it by another name, which would make it everybody's", () => {
		for (const name of ["cache_salt", "cacheSlat", "salt", "cachesalt"]) {
			const { connector, calls } = open(() => 64);
			for (const cacheSalt of [undefined, null, ""]) {
				const misspelt = { ...request("a", 150), cacheSalt, [name]: "tenant" };
				expect(() => connector.getNumNewMatchedTokens(misspelt, 0)).toThrow(
					expect.objectContaining({
						code: "INVALID_ARGUMENT",
						message: expect.stringContaining(`request a has a ${name}, and no cacheSalt`),
					}),
				);
			}
			expect(calls).toEqual([]);
			// An engine's own request may have both.
			const both = { ...request("a", 150, { cacheSalt: "tenant" }), [name]: "tenant" };
			expect(connector.getNumNewMatchedTokens(both, 0)).toEqual([64, true]);
		}
	});

	it("is seen where the engine's class has it", () => {
		class Sequence {
			requestId = "a";
			allTokenIds = range(0, 150);
			get cache_salt() {
				return "tenant";
			}
			salt() {}
		}
		const { connector } = open(() => 64);
		expect(() => connector.getNumNewMatchedTokens(new Sequence(), 0)).toThrow(/has a cache_salt/);
		class Salted extends Sequence {
			cacheSalt = "tenant";
		}
		expect(connector.getNumNewMatchedTokens(new Salted(), 0)).toEqual([64, true]);
	});

	it("never reaches an adapter that does not say that it carries salts: such requests are computed", () => {
		const { adapter, calls } = cache(() => 64);
		const warnings: string[] = [];
		const connector = new SchedulerConnector({
			adapter: { ...adapter, carriesSalt: undefined },
			onWarning: (message) => warnings.push(message),
		});
		for (const id of ["a", "b"]) {
			const salted = request(id, 150, { cacheSalt: "tenant" });
			expect(connector.getNumNewMatchedTokens(salted, 0)).toEqual([0, false]);
			connector.updateStateAfterAlloc(salted, range(0, 10), 0);
			const { requests } = connector.buildConnectorMeta({
				...idle,
				scheduledNewReqs: [salted],
				numScheduledTokens: { [id]: 150 },
			});
			expect(requests).toEqual([]);
			expect(connector.requestFinished(salted)).toEqual([true, null]); // workers tell its end too
		}
		expect(calls).toEqual([]);
		expect(warnings).toEqual([expect.stringContaining("carriesSalt")]);
		const plain = request("c", 150);
		expect(connector.getNumNewMatchedTokens(plain, 0)).toEqual([64, true]);
	});
});

describe("the tokens of an operation", () => {
	/** A request that decodes; `next` is the operation of the step in which it has so many tokens. */
	function decode(allTokenIds: () => readonly number[] | Uint32Array) {
		const { connector } = open(() => 0);
		const a: EngineRequest = {
			requestId: "a",
			get allTokenIds() {
				return allTokenIds();
			},
		};
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 100), 0);
		let computed = 0;
		return () => {
			const scheduled = { a: allTokenIds().length - computed };
			computed += scheduled.a;
			const { requests } = connector.buildConnectorMeta({
				...idle,
				scheduledCachedReqs: [a],
				numScheduledTokens: scheduled,
			});
			expect(requests).toHaveLength(1);
			return requests[0]?.op as LoadStoreOp;
		};
	}

	it("are all that the request has then, and stay so while it grows", () => {
		for (const as of [(ids: number[]) => ids, (ids: number[]) => Uint32Array.from(ids)]) {
			let length = 100;
			const next = decode(() => as(range(1, 1 + length)));
			const planned: [LoadStoreOp, number][] = [];
			for (length of [100, 128, 200, 1000, 1027]) {
				planned.push([next(), length]);
			}
			for (const [op, length] of planned) {
				expect([...op.tokenIds]).toEqual(range(1, 1 + length));
				expect(structuredClone(op)).toEqual(op);
			}
		}
	});

	it("are the request's though an earlier operation's memory was transferred away", () => {
		let tokens = range(1, 101);
		const next = decode(() => tokens);
		const { tokenIds } = next();
		structuredClone(tokenIds, { transfer: [(tokenIds as Uint32Array).buffer as ArrayBuffer] });
		expect(tokenIds).toHaveLength(0);
		tokens = [-1, ...range(2, 129)];
		expect(next().tokenIds).toEqual(tokens);
		tokens = range(1, 193);
		expect([...next().tokenIds]).toEqual(tokens);
	});

	it("are those of now where what was not computed has been replaced", () => {
		let tokens = [...range(0, 64), 7, 7, 7];
		const next = decode(() => tokens);
		next();
		tokens = [...range(0, 64), ...range(500, 564)];
		expect([...next().tokenIds]).toEqual(tokens);
	});

	it("come as they are when one is no token id: the worker refuses it by name", () => {
		for (const wrong of [-1, 1.5, 2 ** 32, Number.NaN, "7", 7n]) {
			const tokens = [...range(0, 70), wrong as number];
			const next = decode(() => tokens);
			expect(next().tokenIds).toEqual(tokens);
		}
	});
});

describe("a load of a request whose tokens have gone", () => {
	it.each<[message: string, change: (tokens: Uint32Array) => Uint32Array]>([
		[
			"was detached",
			(tokens) => {
				structuredClone(tokens, { transfer: [tokens.buffer as ArrayBuffer] });
				return tokens;
			},
		],
		["has 100 tokens, and 128 were found", (tokens) => tokens.subarray(0, 100)],
	])("is refused, and takes no other load along: %s", (message, change) => {
		const { connector } = open(() => 128);
		const a = { requestId: "a", allTokenIds: Uint32Array.from(range(0, 150)) };
		const b = request("b", 150);
		for (const [each, first] of [
			[a, 0],
			[b, 20],
		] as const) {
			connector.getNumNewMatchedTokens(each, 0);
			connector.updateStateAfterAlloc(each, range(first, first + 8), 128);
		}
		a.allTokenIds = change(a.allTokenIds) as typeof a.allTokenIds;
		expect(() => connector.buildConnectorMeta(idle)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(new RegExp(`allTokenIds of a ${message}`)),
			}),
		);
		connector.requestFinished(a);
		const { requests } = connector.buildConnectorMeta(idle);
		expect(requests.map(({ requestId }) => requestId)).toEqual(["b"]);
	});
});

/** Looks up, allocates and plans the load of a request's hit. */
function load(connector: SchedulerConnector, a: EngineRequest, blocks: number[]): void {
	const [tokens] = connector.getNumNewMatchedTokens(a, 0);
	connector.updateStateAfterAlloc(a, blocks, tokens as number);
	expect(connector.buildConnectorMeta(idle).requests).toHaveLength(1);
}

function stored(connector: SchedulerConnector, a: EngineRequest, tokens: number, isNew = true) {
	const { requests } = connector.buildConnectorMeta({
		...idle,
		...(isNew ? { scheduledNewReqs: [a] } : { scheduledCachedReqs: [a] }),
		numScheduledTokens: { [a.requestId]: tokens },
	});
	const stores = requests.filter(({ direction }) => direction === "STORE");
	return stores.map(({ op }) => [op.start, op.end]);
}

describe("a load that failed", () => {
	it("is not waited for again, also when nobody says how much is computed", () => {
		const { connector } = open(() => 128);
		for (const numComputedTokens of [undefined, 0]) {
			const a = request(`r${numComputedTokens}`, 150, { numComputedTokens });
			load(connector, a, range(0, 8));
			expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([0, false]);
			expect(connector.tracker(a.requestId)?.state).toBe("BYPASSED");
		}
	});

	it("leaves no chunk out that is computed instead, or that the engine has itself by then", () => {
		const { connector } = open(() => 128);
		const a = { ...request("a", 150), numComputedTokens: 0 };
		load(connector, a, range(0, 8));
		expect(connector.getNumNewMatchedTokens(a, 32)).toEqual([0, false]);
		connector.updateStateAfterAlloc(a, range(20, 30), 0);
		a.numComputedTokens = 32;
		expect(stored(connector, a, 118)).toEqual([[0, 128]]);
	});

	it("has nothing stored before it is computed, when only a part was loaded", () => {
		const { connector } = open(() => 128);
		let computed = 0;
		const a = {
			...request("a", 300),
			get numComputedTokens() {
				return computed;
			},
		};
		load(connector, a, range(0, 19));
		// Two blocks of eight were good: the engine computes the others, a few in each step.
		computed = 32;
		connector.updateStateAfterAlloc(a, range(0, 19), 0);
		expect(stored(connector, a, 96)).toEqual([]);
		computed = 128;
		expect(stored(connector, a, 63, false)).toEqual([]);
		computed = 191;
		expect(stored(connector, a, 1, false)).toEqual([[128, 192]]);
	});

	it("ends the stores of a request of which nobody says how much is computed", () => {
		const { connector } = open(() => 128);
		const [a, b] = [request("a", 300), request("b", 300)];
		load(connector, a, range(0, 19));
		load(connector, b, range(20, 39));
		connector.updateConnectorOutput({ invalidBlockIds: [2, 3] });
		connector.updateStateAfterAlloc(a, range(0, 19), 0);
		connector.updateStateAfterAlloc(b, range(20, 39), 0);
		expect(stored(connector, a, 96)).toEqual([]);
		expect(stored(connector, a, 100, false)).toEqual([]);
		expect(stored(connector, b, 172)).toEqual([[128, 256]]);
		expect(() => connector.updateConnectorOutput({ invalidBlockIds: [-1] })).toThrow(
			/an invalid block id is -1/,
		);
	});

	it("in the step that computes spoils what is computed on it: that step stores nothing, the next does", () => {
		const { connector } = open(() => 64, { loadAsync: false });
		const a = { ...request("a", 150), numComputedTokens: 64 };
		const b = { ...request("b", 150), numComputedTokens: 0 };
		expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([64, false]);
		connector.updateStateAfterAlloc(a, range(0, 10), 64);
		expect(stored(connector, a, 85)).toEqual([]);
		a.numComputedTokens = 149;
		expect(stored(connector, a, 1, false)).toEqual([[64, 128]]);
		// Without a load a step stores what it computes.
		connector.getNumNewMatchedTokens(b, 64);
		connector.updateStateAfterAlloc(b, range(20, 30), 0);
		b.numComputedTokens = 64;
		expect(stored(connector, b, 86)).toEqual([[64, 128]]);
	});
});

describe("a request that was preempted", () => {
	it("has its local hit stored when the engine says what it has computed", () => {
		const { connector } = open(() => 0);
		const a = request("a", 150);
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 10), 0);
		const again = { ...a, status: "PREEMPTED", numComputedTokens: 112 };
		expect(connector.getNumNewMatchedTokens(again, 112)).toEqual([0, false]);
		connector.updateStateAfterAlloc(again, range(20, 30), 0);
		expect(stored(connector, again, 38)).toEqual([[0, 128]]);
	});
});

describe("what a scheduler's connector cannot use", () => {
	const detached = new Uint32Array(10);
	structuredClone(detached, { transfer: [detached.buffer] });

	/** Two requests that stand where calls can harm them: one waits for its load, one is to be stored. */
	function busy(found: () => number | null = () => 64) {
		const { connector, calls } = open(found, { numBlocks: 100 });
		const [a, b] = [request("a", 150), request("b", 150)];
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 10), 64);
		connector.getNumNewMatchedTokens(b, 16);
		connector.updateStateAfterAlloc(b, range(20, 29), 0);
		return { connector, calls, a, b };
	}

	type Busy = ReturnType<typeof busy>;
	const step = (change: object) => ({
		scheduledNewReqs: [{ requestId: "a" }],
		scheduledCachedReqs: [{ requestId: "b", newBlockIds: [29] }],
		numScheduledTokens: { a: 86, b: 134, c: 1 },
		...change,
	});
	const plan =
		(change: object) =>
		({ connector }: Busy) =>
			connector.buildConnectorMeta(step(change) as never);
	const matched =
		(tokens: number, change: object, computed: unknown = 0) =>
		({ connector }: Busy) =>
			connector.getNumNewMatchedTokens(
				{ ...request("c", tokens), ...change } as EngineRequest,
				computed as number,
			);
	const allocated =
		(blockIds: unknown, tokens: unknown = 0) =>
		({ connector, b }: Busy) =>
			connector.updateStateAfterAlloc(b, blockIds as number[], tokens as number);

	it.each<[string, (engine: Busy) => unknown, ErrorCode?]>([
		["numComputedTokens is -1", matched(150, {}, -1)],
		["numComputedTokens is NaN", matched(150, {}, Number.NaN)],
		["numComputedTokens is 151: it must be an integer from 0 to 150", matched(150, {}, 151)],
		["requestId must be a string", matched(150, { requestId: 0 })],
		["allTokenIds of c must be", matched(150, { allTokenIds: undefined })],
		["allTokenIds of c was detached", matched(150, { allTokenIds: detached })],
		["numBlockHashes is -1", matched(150, { numBlockHashes: -1 })],
		["numPromptTokens of c is -1", matched(150, { numPromptTokens: -1 })],
		["maxOffloadTokens of c is NaN", matched(150, { maxOffloadTokens: Number.NaN })],
		["a salt must not contain '/'", matched(150, { cacheSalt: "a/b" }), "INVALID_SALT"],
		["a salt has at most 128", matched(150, { cacheSalt: "x".repeat(129) }), "INVALID_SALT"],
		["cacheSalt must be a string", matched(150, { cacheSalt: "\ud800" }), "INVALID_SALT"],
		["cacheSalt must be a string", matched(150, { cacheSalt: 7 }), "INVALID_SALT"],
		[
			"request c is unknown",
			({ connector }) => connector.updateStateAfterAlloc(request("c", 1), [], 0),
		],
		["a block id is -1", allocated([...range(20, 29), -1])],
		["block 100 is not below 100", allocated([...range(20, 29), 100])],
		["block 4294967294 is not below 100", allocated([...range(20, 29), 2 ** 32 - 2])],
		["a block id is 4294967295", allocated([...range(20, 29), 2 ** 32 - 1])],
		["a block id is 1.5", allocated([...range(20, 29), 1.5])],
		["has 9 blocks and was allocated 1", allocated([30])],
		["blocks of 2 groups were given for 1", allocated([range(20, 29), [1]])],
		["blockIds must be an array", allocated(undefined)],
		["blockIds must be an array", allocated([range(20, 29), null])],
		["blockIds must be an array", allocated("12")],
		["the buffer of blockIds was detached", allocated(detached)],
		["numExternalTokens is -1", allocated(range(20, 29), -1)],
		[
			"numExternalTokens is 151: it must be an integer from 0 to 150",
			allocated(range(20, 29), 151),
		],
		["request c is unknown", plan({ scheduledNewReqs: [{ requestId: "c" }, { requestId: "a" }] })],
		[
			"request c is unknown",
			plan({ scheduledCachedReqs: [{ requestId: "b" }, { requestId: "c" }] }),
		],
		["request 0 is unknown", plan({ scheduledNewReqs: [{ requestId: 0 }] })],
		[
			"request b is in the step twice",
			plan({ scheduledNewReqs: [{ requestId: "a" }, { requestId: "b" }] }),
		],
		["numScheduledTokens of b is -1", plan({ numScheduledTokens: { a: 86, b: -1 } })],
		["numScheduledTokens of b is NaN", plan({ numScheduledTokens: { a: 86, b: Number.NaN } })],
		["numScheduledTokens of b is 0.5", plan({ numScheduledTokens: { a: 86, b: 0.5 } })],
		["numScheduledTokens of b is of type undefined", plan({ numScheduledTokens: { a: 86 } })],
		["numScheduledTokens must be an object", plan({ numScheduledTokens: undefined })],
		["scheduledNewReqs must be an array", plan({ scheduledNewReqs: undefined })],
		["scheduledCachedReqs must be an array", plan({ scheduledCachedReqs: new Set() })],
		[
			"block 100 is not below 100",
			plan({ scheduledCachedReqs: [{ requestId: "b", newBlockIds: [100] }] }),
		],
		["a block id is -1", plan({ scheduledCachedReqs: [{ requestId: "b", newBlockIds: [-1] }] })],
		[
			"blocks of 2 groups were given for 1",
			plan({ scheduledCachedReqs: [{ requestId: "b", newBlockIds: [[1], [2]] }] }),
		],
		[
			"an invalid block id is -1",
			({ connector }) => connector.updateConnectorOutput({ invalidBlockIds: [0, -1] }),
		],
		[
			"invalidBlockIds must be",
			({ connector }) => connector.updateConnectorOutput({ invalidBlockIds: 7 as never }),
		],
	])(
		"is named, and the next step is planned as without it: %s",
		(message, call, code = "INVALID_ARGUMENT") => {
			const [engine, untouched] = [busy(), busy()];
			const state = ({ connector, calls }: Busy) => {
				const fields = (id: string) => {
					const tracker = connector.tracker(id);
					return (
						tracker && [
							tracker.state,
							tracker.numTokens,
							tracker.numScheduledTokens,
							tracker.numLocalHitTokens,
							tracker.numExternalHitTokens,
							tracker.numStoredTokens,
							tracker.allocatedBlockIds,
						]
					);
				};
				return [["a", "b", "c"].map(fields), calls];
			};
			const refused = () => call(engine);
			expect(refused).toThrow(KvferryError);
			expect(refused).toThrow(
				expect.objectContaining({ code, message: expect.stringContaining(message) }),
			);
			expect(state(engine)).toEqual(state(untouched));
			const [planned, expected] = [engine, untouched].map(plan({}));
			expect(planned).toEqual(expected);
			expect(expected?.requests.map(({ direction, op }) => [direction, op.start, op.end])).toEqual([
				["RETRIEVE", 0, 64],
				["STORE", 64, 128],
				["STORE", 64, 128],
			]);
			expect(state(engine)).toEqual(state(untouched));
		},
	);

	it("leaves a preempted request as it was", () => {
		const { connector, a } = busy();
		connector.buildConnectorMeta(step({}));
		const before = connector.tracker("a");
		for (const change of [{ numBlockHashes: -1 }, { maxOffloadTokens: -1 }, { cacheSalt: "@" }]) {
			const again = { ...a, status: "PREEMPTED", ...change };
			expect(() => connector.getNumNewMatchedTokens(again, 0)).toThrow(KvferryError);
			expect(connector.tracker("a")).toBe(before);
		}
	});

	it("is not known afterwards when the adapter refuses its tokens", () => {
		const { adapter } = cache(() => 0);
		const refusal = new KvferryError("INVALID_TOKEN", "token 0 is -1");
		const refusing = {
			...adapter,
			maybeSubmitLookupRequest: () => {
				throw refusal;
			},
		};
		const connector = new SchedulerConnector({ adapter: refusing });
		expect(() => connector.getNumNewMatchedTokens(request("a", 150), 0)).toThrow(refusal);
		expect(connector.tracker("a")).toBeUndefined();
		expect(connector.requestFinished(request("a", 150))).toEqual([false, null]);
	});

	it("is an adapter's hit that is no whole number of chunks, or more than the request", () => {
		for (const found of [48, 192, -64, Number.NaN]) {
			const { connector } = open(() => found);
			const a = request("a", 150);
			const refused = () => connector.getNumNewMatchedTokens(a, 16);
			expect(refused).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringMatching(new RegExp(`${found}`)),
				}),
			);
			const untouched = { numExternalHitTokens: 0, numLocalHitTokens: 0, numStoredTokens: 0 };
			expect(connector.tracker("a")).toMatchObject(untouched);
		}
	});

	it("is a size that does not fit", () => {
		const refused: [Partial<SchedulerConnectorOptions>, RegExp][] = [
			[{ blockSize: 48 }, /64.*48/],
			[{ blockSize: [16, 24] }, /64.*24/],
			[{ blockSize: 0 }, /blockSize is 0/],
			[{ blockSize: null as never }, /blockSize must be/],
			[{ numBlocks: -1 }, /numBlocks is -1/],
			[{ relocationWindow: -1 }, /relocationWindow is -1/],
			[{ planner: "vllm" as never }, /planner must be/],
			[{ loadAsync: "false" as never }, /loadAsync is "false": it must be true or false/],
			[{ saveDecodeCache: 1 as never }, /saveDecodeCache is 1: it must be/],
			[{ onWarning: "log" as never }, /onWarning is "log": it must be a function/],
			[{ adapter: { ...cache(() => 0).adapter, chunkSize: 0 } }, /chunkSize is 0/],
		];
		for (const [options, message] of refused) {
			const make = () => open(() => 0, options);
			expect(make).toThrow(KvferryError);
			expect(make).toThrow(message);
		}
	});
});

describe("blocks that a request is not known to have", () => {
	const told = (connector: SchedulerConnector, a: EngineRequest) => {
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 4), 0);
		connector.buildConnectorMeta({ ...idle, scheduledNewReqs: [a], numScheduledTokens: { a: 60 } });
	};

	it("are refused where its status does not say that it was preempted", () => {
		const { connector } = open(() => 0);
		const a = request("a", 64);
		told(connector, a);
		connector.getNumNewMatchedTokens({ ...a, status: "preempted" }, 0);
		expect(() => connector.updateStateAfterAlloc(a, range(20, 24), 0)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(/block 20 where it has block 0: .*PREEMPTED/),
			}),
		);
		const again = { ...a, status: "PREEMPTED" };
		connector.getNumNewMatchedTokens(again, 0);
		connector.updateStateAfterAlloc(again, range(20, 24), 0);
		expect(connector.tracker("a")?.allocatedBlockIds).toEqual([range(20, 24)]);
	});

	it("are refused where it is resumed without having been asked for again", () => {
		const { connector } = open(() => 0);
		const a = request("a", 64);
		told(connector, a);
		const resume = (newBlockIds: number[]) =>
			connector.buildConnectorMeta({
				...idle,
				scheduledCachedReqs: [{ requestId: "a", resumed: true, newBlockIds }],
				numScheduledTokens: { a: 4 },
			}).requests;
		expect(() => resume(range(20, 24))).toThrow(
			/request a is resumed with other blocks .*PREEMPTED/,
		);
		expect(() => resume(range(0, 3))).toThrow(/other blocks/);
		expect(resume(range(0, 4)).map(({ op }) => op.blockIds)).toEqual([[range(0, 4)]]);
	});

	it("may be anywhere in a sliding window that moves them", () => {
		const { connector } = open(() => 0, { relocationWindow: 2 });
		const a = request("a", 96);
		told(connector, a);
		connector.updateStateAfterAlloc(a, [0, 1, 0, 3, 2], 0);
		expect(connector.tracker("a")?.allocatedBlockIds).toEqual([[0, 1, 0, 3, 2]]);
		expect(() => connector.updateStateAfterAlloc(a, [0, 7, 0, 3, 2], 0)).toThrow(/block 7 where/);
	});
});

describe("tokens that are not to be loaded", () => {
	it("are refused where the engine would count them all the same", () => {
		const { connector } = open(() => 0);
		const a = request("a", 150);
		expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([0, false]);
		const refused = (of: SchedulerConnector) =>
			expect(() => of.updateStateAfterAlloc(a, range(0, 4), 64)).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringMatching(/^numExternalTokens is 64, and 0 tokens .* for a/),
				}),
			);
		refused(connector);
		expect(connector.tracker("a")?.numAllocatedBlocks).toBe(0);
		const { adapter } = cache(() => 64);
		const saltless = new SchedulerConnector({
			adapter: { ...adapter, carriesSalt: undefined },
			onWarning() {},
		});
		saltless.getNumNewMatchedTokens({ ...a, cacheSalt: "tenant" }, 0);
		refused(saltless);
	});
});

describe("tokens that are to be loaded", () => {
	it("may be told again when they are there, and are no more than were found", () => {
		const { connector } = open(() => 128);
		const a = request("a", 200);
		expect(connector.getNumNewMatchedTokens(a, 32)).toEqual([96, true]);
		expect(() => connector.updateStateAfterAlloc(a, range(0, 13), 97)).toThrow(
			/96 tokens .* at most/,
		);
		connector.updateStateAfterAlloc(a, range(0, 8), 96);
		expect(connector.buildConnectorMeta(idle).requests).toHaveLength(1);
		connector.updateStateAfterAlloc(a, range(0, 13), 96);
		expect(stored(connector, a, 72)).toEqual([[128, 192]]);
	});

	it("may not be told once they were to be computed", () => {
		const { connector } = open(() => 128);
		const a = request("a", 200);
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 13), 0);
		expect(() => connector.updateStateAfterAlloc(a, range(0, 13), 128)).toThrow(
			/0 tokens .* at most/,
		);
	});
});

describe("an id that two requests have", () => {
	it("gives the second one nothing of the first's", () => {
		const { connector } = open(() => 64);
		const annas = request("chat", 150, { cacheSalt: "anna" });
		expect(connector.getNumNewMatchedTokens(annas, 0)).toEqual([64, true]);
		const refused = (second: EngineRequest, message: RegExp) => {
			expect(() => connector.getNumNewMatchedTokens(second, 0)).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringMatching(message),
				}),
			);
		};
		refused(
			request("chat", 150, { cacheSalt: "bob" }),
			/another cacheSalt before: .*requestFinished/,
		);
		refused(request("chat", 150), /another cacheSalt before/);
		const other = { ...annas, allTokenIds: [...range(0, 99), 7, ...range(100, 150)] };
		refused(other, /another token at position 99 before: .*requestFinished/);
		expect(connector.requestFinished(annas)).toEqual([true, null]);
	});

	it("is one request's where it was copied and has grown", () => {
		const { connector } = open(() => 64);
		connector.getNumNewMatchedTokens(request("a", 70), 0);
		const grown = request("a", 150);
		expect(connector.getNumNewMatchedTokens(grown, 0)).toEqual([64, true]);
		connector.updateStateAfterAlloc(grown, range(0, 4), 64);
		const [load] = connector.buildConnectorMeta(idle).requests;
		expect(load?.op.tokenIds).toHaveLength(150);
	});

	it("is one request's where what it generated was replaced, and its tokens are made anew each time", () => {
		const { connector } = open(() => 64);
		const prompt = range(0, 100);
		let asked = 0;
		const view = (...generated: number[]): EngineRequest => ({
			requestId: "a",
			get allTokenIds() {
				asked++;
				return [...prompt, ...generated];
			},
		});
		connector.getNumNewMatchedTokens(view(), 0);
		connector.getNumNewMatchedTokens(view(500, 901, 902), 0);
		asked = 0;
		expect(connector.getNumNewMatchedTokens(view(500, 777), 0)).toEqual([64, true]);
		expect(asked).toBeLessThan(20); // not once for each token
	});

	it("has its blocks kept until a worker tells its end, however often it is ended", () => {
		const { connector } = open(() => 64);
		const a = request("a", 150);
		load(connector, a, range(0, 4));
		expect(connector.requestFinished(a)).toEqual([true, null]);
		expect(connector.requestFinished(a)).toEqual([true, null]);
		connector.updateConnectorOutput({ finishedSending: ["a"] });
		expect(connector.requestFinished(a)).toEqual([false, null]);
	});
});

describe("a preempted request whose load fails, under LMCache's rules", () => {
	it("is loaded once, then computed; preempted after it ran, it asks the cache anew", () => {
		const { connector } = open(() => 64, { planner: "lmcache" });
		const a = request("a", 150);
		load(connector, a, range(0, 4));
		connector.updateStateAfterAlloc(a, range(0, 10), 0);
		connector.buildConnectorMeta({ ...idle, scheduledNewReqs: [a], numScheduledTokens: { a: 86 } });
		const again = { ...a, status: "PREEMPTED", numComputedTokens: 0 };
		expect(connector.getNumNewMatchedTokens(again, 0)).toEqual([64, true]);
		connector.updateStateAfterAlloc(again, range(20, 24), 64);
		expect(connector.buildConnectorMeta(idle).requests).toHaveLength(1);
		// Nothing of it came, so it is preempted again, for the engine.
		expect(connector.getNumNewMatchedTokens(again, 0)).toEqual([0, false]);
		expect(connector.getNumNewMatchedTokens(again, 0)).toEqual([0, false]);
		connector.updateStateAfterAlloc(again, range(30, 40), 0);
		expect(connector.buildConnectorMeta(idle).requests).toEqual([]);
		expect(stored(connector, again, 150)).toEqual([[0, 128]]);
		expect(connector.getNumNewMatchedTokens(again, 0)).toEqual([64, true]);
	});
});

describe("what a request may do", () => {
	it("is computed without the cache when its id is used again before workers told its former end", () => {
		const { connector } = open(() => 64);
		const a = request("a", 150);
		load(connector, a, range(0, 4));
		connector.requestFinished(a);
		expect(connector.getNumNewMatchedTokens(request("a", 150), 0)).toEqual([0, false]);
		expect(connector.requestFinished(a)).toEqual([true, null]);
		connector.updateConnectorOutput({ finishedSending: ["a"] });
		expect(connector.getNumNewMatchedTokens(request("a", 150), 0)).toEqual([64, true]);
	});

	it("uses as much of a hit as it has hashes for", () => {
		const { connector } = open(() => 128);
		const a = request("a", 150, { numBlockHashes: 5 });
		expect(connector.getNumNewMatchedTokens(a, 0)).toEqual([64, true]);
		const b = request("b", 150, { numBlockHashes: 3 });
		expect(connector.getNumNewMatchedTokens(b, 0)).toEqual([0, false]);
	});

	it("stores no generated token under LMCache's rules, after a preemption either", () => {
		const { connector } = open(() => 0, { planner: "lmcache" });
		const tokens = range(0, 70);
		const a = { requestId: "a", allTokenIds: tokens };
		connector.getNumNewMatchedTokens(a, 0);
		connector.updateStateAfterAlloc(a, range(0, 5), 0);
		expect(stored(connector, a, 70)).toEqual([[0, 64]]);
		tokens.push(...range(70, 140));
		const again = { ...a, status: "PREEMPTED" };
		connector.getNumNewMatchedTokens(again, 0);
		connector.updateStateAfterAlloc(again, range(10, 19), 0);
		expect(stored(connector, again, 140)).toEqual([[0, 64]]);
	});

	it("is stored in a step that loads others, unless it shares their blocks", () => {
		const { connector } = open(() => 64, { loadAsync: false });
		const none = open(() => 0, { loadAsync: false });
		expect(none.connector.getNumNewMatchedTokens(request("x", 150), 0)).toEqual([0, false]);
		const [loads, shares, apart] = [request("a", 150), request("b", 150), request("c", 150)];
		const blocks = new Map([
			[loads, range(0, 10)],
			[shares, [...range(0, 4), ...range(20, 26)]],
			[apart, range(30, 40)],
		]);
		for (const [each, ids] of blocks) {
			const [found] = connector.getNumNewMatchedTokens(each, each === loads ? 0 : 64);
			connector.updateStateAfterAlloc(each, ids, found as number);
		}
		const { requests } = connector.buildConnectorMeta({
			...idle,
			scheduledNewReqs: [...blocks.keys()],
			numScheduledTokens: { a: 86, b: 86, c: 86 },
		});
		expect(requests.map(({ requestId, direction }) => [requestId, direction])).toEqual([
			["a", "RETRIEVE"],
			["c", "STORE"],
		]);
	});
});
