import { describe, expect, expectTypeOf, it } from "vitest";
import {
	handleFailedRecving,
	handleInvalidBlocks,
	type InvalidBlocksStep,
	type KvLoadFailurePolicy,
	type RecoveryRequest,
	updateWaitingForRemoteKv,
} from "../ts/index.js";

function code(expected: string, message: RegExp) {
	return expect.objectContaining({ code: expected, message: expect.stringMatching(message) });
}

const request = (
	requestId: string,
	numComputedTokens: number,
	blockIds: readonly number[],
): RecoveryRequest => ({ requestId, numComputedTokens, blockIds });

const loading = (requestId: string, numComputedTokens: number, blockIds: readonly number[]) => ({
	...request(requestId, numComputedTokens, blockIds),
	status: "WAITING_FOR_REMOTE_KVS",
});

/** Two requests that share blocks 1 to 3: 48 tokens each before the step. */
const shared: InvalidBlocksStep = {
	running: [request("a", 64, [1, 2, 3, 4]), request("b", 65, [1, 2, 3, 5, 6])],
	numScheduledTokens: { a: 16, b: 17 },
	invalidBlockIds: [2],
};

describe("tokens counted as computed before they were computed", () => {
	// The prompt's first 32 tokens are loaded, 24 more are scheduled: the engine counts 56.
	const running = [request("a", 56, [10, 11, 12, 13])];
	const step = { running, numScheduledTokens: { a: 24 } };

	it("are not among those that a failed load takes away", () => {
		const recovery = handleInvalidBlocks({ ...step, invalidBlockIds: [11] });
		expect(recovery.numComputedTokens).toEqual(new Map([["a", 16]]));
		expect(recovery.totalAffectedTokens).toBe(16); // not 40
	});

	it("make no request fail for blocks that nothing was loaded into", () => {
		const recovery = handleInvalidBlocks({ ...step, invalidBlockIds: [12, 13] });
		expect(recovery).toEqual({
			numComputedTokens: new Map(),
			discardedRequestIds: [],
			failedRecvingRequestIds: [],
			totalAffectedTokens: 0,
			affectedBlockIds: [],
			evictedBlockIds: [],
		});
	});

	it("may be in a block whose beginning was loaded", () => {
		const partly = { ...step, numScheduledTokens: { a: 16 } }; // 40 before: 8 in block 12
		const recovery = handleInvalidBlocks({ ...partly, invalidBlockIds: [12] });
		expect(recovery.numComputedTokens.get("a")).toBe(32);
		expect(recovery.totalAffectedTokens).toBe(8);
	});

	it("are taken off for loads between steps too, and are none where the step names none", () => {
		const waiting = [loading("w", 48, [20, 21, 22])];
		const step = { running: [], waiting, invalidBlockIds: [22] };
		const some = handleInvalidBlocks({ ...step, numScheduledTokens: { w: 16 } });
		expect(some.numComputedTokens.size).toBe(0);
		const none = handleInvalidBlocks({ ...step, numScheduledTokens: {} });
		expect(none.numComputedTokens).toEqual(new Map([["w", 32]]));
	});

	it("cannot be more than all: a count below 0 is refused", () => {
		const more = { ...step, numScheduledTokens: { a: 57 }, invalidBlockIds: [] };
		expect(() => handleInvalidBlocks(more)).toThrow(
			code("INVALID_ARGUMENT", /numScheduledTokens of a, .* is 57: .* from 0 to 56/),
		);
	});
});

describe("blocks that requests share", () => {
	it("are computed anew by the first, and counted once", () => {
		const { numComputedTokens, totalAffectedTokens } = handleInvalidBlocks(shared);
		expect([...numComputedTokens]).toEqual([
			["a", 16],
			["b", 48], // what it had before the step: a computes block 2 again
		]);
		expect(totalAffectedTokens).toBe(32 + 17);
	});

	it("do not hide an invalid block of the second's own", () => {
		const running = [request("a", 64, [1, 2, 3, 4]), request("b", 64, [1, 2, 9, 5])];
		const step = { ...shared, running, numScheduledTokens: {}, invalidBlockIds: [9, 2] };
		expect([...handleInvalidBlocks(step).numComputedTokens.values()]).toEqual([16, 32]);
	});

	it("of a running and a waiting request are each one's own", () => {
		const waiting = [loading("w", 48, [1, 2, 3])];
		const recovery = handleInvalidBlocks({ ...shared, waiting });
		expect(recovery.numComputedTokens.get("w")).toBe(16);
		expect(recovery.totalAffectedTokens).toBe(32 + 17 + 32);
	});
});

describe("the policy", () => {
	const step: InvalidBlocksStep = {
		running: [request("a", 48, [1, 2, 3, 4]), request("b", 32, [5, 6])],
		waiting: [loading("w", 48, [7, 8, 9])],
		numScheduledTokens: { a: 16 },
		invalidBlockIds: new Set([8, 2]),
	};

	it("fail, the default, ends requests and evicts what running ones have from there on", () => {
		const recovery = handleInvalidBlocks(step);
		expect(recovery).toEqual(handleInvalidBlocks({ ...step, kvLoadFailurePolicy: "fail" }));
		expect([...recovery.discardedRequestIds].sort()).toEqual(["a", "w"]);
		expect(recovery.failedRecvingRequestIds).toEqual([]);
		expect(recovery.evictedBlockIds).toEqual([2, 3, 4]); // 4 was allocated in this step
		expect(recovery.affectedBlockIds).toEqual([8, 2]);
	});

	it("recompute evicts nothing, and lets the load of a waiting request end", () => {
		const recovery = handleInvalidBlocks({ ...step, kvLoadFailurePolicy: "recompute" });
		expect(recovery.discardedRequestIds).toEqual(["a"]);
		expect(recovery.failedRecvingRequestIds).toEqual(["w"]);
		expect(recovery.evictedBlockIds).toEqual([]);
		expect(Object.fromEntries(recovery.numComputedTokens)).toEqual({ a: 16, w: 16 });
	});

	it("is one of two, in the editor and at run time", () => {
		expectTypeOf<InvalidBlocksStep["kvLoadFailurePolicy"]>().toEqualTypeOf<
			KvLoadFailurePolicy | undefined
		>();
		const kvLoadFailurePolicy = "ignore" as KvLoadFailurePolicy;
		const refused = code("INVALID_ARGUMENT", /kvLoadFailurePolicy is ignore/);
		expect(() => handleInvalidBlocks({ ...step, kvLoadFailurePolicy })).toThrow(refused);
		expect(() =>
			handleFailedRecving({ requests: [], failedRequestIds: [], kvLoadFailurePolicy }),
		).toThrow(refused);
	});
});

describe("what no load went to", () => {
	it("is left alone: waiting requests that load nothing, ids of no block and no request", () => {
		const waiting = ["WAITING", "PREEMPTED", undefined].map((status, at) => ({
			...request(`w${at}`, 16, [2]),
			status,
		}));
		const numScheduledTokens = { ...shared.numScheduledTokens, aborted: 5 };
		const invalidBlockIds = [999, 2, 2];
		expect(
			handleInvalidBlocks({ ...shared, waiting, numScheduledTokens, invalidBlockIds }),
		).toEqual(handleInvalidBlocks(shared));
	});

	it("is not read from what every object has", () => {
		const running = [request("constructor", 16, [1])];
		const recovery = handleInvalidBlocks({ ...shared, running, invalidBlockIds: [1] });
		expect(recovery.numComputedTokens.get("constructor")).toBe(0);
	});
});

describe("several KV groups", () => {
	it("are refused for blocks, whatever is invalid: whole requests may fail instead", () => {
		for (const invalidBlockIds of [[2], [999], []]) {
			expect(() =>
				handleInvalidBlocks({ ...shared, invalidBlockIds, numKvCacheGroups: 2 }),
			).toThrow(code("UNSUPPORTED_MODEL", /2 KV groups.*handleFailedRecving/));
		}
	});

	it("may fail as whole requests", () => {
		const requests = [
			{ requestId: "w", status: "WAITING_FOR_REMOTE_KVS" },
			{ requestId: "v", status: "WAITING_FOR_REMOTE_KVS" },
			{ requestId: "r", status: "RUNNING" },
		];
		const failures = { requests, failedRequestIds: ["r", "w", "aborted"] };
		expect(handleFailedRecving(failures)).toEqual({
			numComputedTokens: new Map(),
			discardedRequestIds: ["w"],
			failedRecvingRequestIds: [],
		});
		expect(handleFailedRecving({ ...failures, kvLoadFailurePolicy: "recompute" })).toEqual({
			numComputedTokens: new Map([["w", 0]]),
			discardedRequestIds: [],
			failedRecvingRequestIds: ["w"],
		});
	});
});

describe("a load that has ended", () => {
	it("leaves the last token to compute", () => {
		expect(updateWaitingForRemoteKv({ numComputedTokens: 32, numTokens: 32 })).toEqual({
			numComputedTokens: 31,
			numTokensToCache: 32,
			freeBlocks: false,
		});
		const shared = { numComputedTokens: 32, numTokens: 32, failedRecving: true };
		expect(updateWaitingForRemoteKv(shared).numComputedTokens).toBe(31);
	});

	it("keeps what came before the first invalid block, and gives the blocks back for nothing", () => {
		const failed = { numTokens: 40, failedRecving: true };
		expect(updateWaitingForRemoteKv({ ...failed, numComputedTokens: 16 })).toEqual({
			numComputedTokens: 16,
			numTokensToCache: 16,
			freeBlocks: false,
		});
		expect(updateWaitingForRemoteKv({ ...failed, numComputedTokens: 0 }).freeBlocks).toBe(true);
		const nothing = { numTokens: 40, numComputedTokens: 0 };
		expect(updateWaitingForRemoteKv(nothing).freeBlocks).toBe(false);
	});

	it.each([
		["numTokens is 0", { numTokens: 0, numComputedTokens: 0 }],
		["numComputedTokens is 17", { numTokens: 16, numComputedTokens: 17 }],
		["numComputedTokens is -1", { numTokens: 16, numComputedTokens: -1 }],
	])("has counts that can be: %s", (message, load) => {
		expect(() => updateWaitingForRemoteKv(load)).toThrow(
			code("INVALID_ARGUMENT", new RegExp(message)),
		);
	});
});

describe("bad input", () => {
	const detached = new Uint32Array(2);
	structuredClone(detached, { transfer: [detached.buffer] });
	it.each<[string, object]>([
		["blockSize is 0", { blockSize: 0 }],
		["numKvCacheGroups is 0", { numKvCacheGroups: 0 }],
		["numComputedTokens of a is -16", { running: [request("a", -16, [])] }],
		["numComputedTokens of a is 1.5", { running: [request("a", 1.5, [])] }],
		["numScheduledTokens of b, .* is -1", { numScheduledTokens: { b: -1 } }],
		["numScheduledTokens must be", { numScheduledTokens: new Map([["a", 16]]) }],
		["a block of blockIds of a is -1", { running: [request("a", 16, [-1])] }],
		["blockIds of a must be", { running: [request("a", 16, 7 as never)] }],
		["blockIds of a was detached", { running: [request("a", 16, detached as never)] }],
		["a block of invalidBlockIds is 4294967296", { invalidBlockIds: [2 ** 32] }],
		["invalidBlockIds must be", { invalidBlockIds: undefined }],
		["request a is in the step twice", { waiting: [loading("a", 16, [])] }],
		["running must be an array", { running: new Set() }],
		["a request of running must be an object", { running: [null] }],
		["a request of waiting must be an object", { waiting: [undefined] }],
		["requestId must be a string", { running: [request(7 as never, 16, [])] }],
		["numComputedTokens of a is NaN", { running: [request("a", Number.NaN, [])] }],
		["numScheduledTokens of a, .* is NaN", { numScheduledTokens: { a: Number.NaN } }],
		["numScheduledTokens of b, .* is 66: .* from 0 to 65", { numScheduledTokens: { b: 66 } }],
	])("is refused by name: %s", (message, change) => {
		const step = { ...shared, ...change } as InvalidBlocksStep;
		expect(() => handleInvalidBlocks(step)).toThrow(code("INVALID_ARGUMENT", new RegExp(message)));
	});

	it("among failed requests is refused by name", () => {
		const w = { requestId: "w", status: "WAITING_FOR_REMOTE_KVS" };
		for (const [failures, message] of [
			[{ requests: [w, null], failedRequestIds: [] }, /a request of requests must be/],
			[{ requests: undefined, failedRequestIds: [] }, /requests must be an array/],
			[{ requests: [w], failedRequestIds: 7 }, /failedRequestIds must be/],
			[{ requests: [w], failedRequestIds: ["w", 7] }, /a request id of failedRequestIds must be/],
		] as const) {
			expect(() => handleFailedRecving(failures as never)).toThrow(
				code("INVALID_ARGUMENT", message),
			);
		}
	});

	it("and good input are left as they are", () => {
		const frozen = Object.freeze({ ...shared, running: Object.freeze([...shared.running]) });
		const before = structuredClone(frozen);
		handleInvalidBlocks(frozen);
		expect(frozen).toEqual(before);
	});
});
