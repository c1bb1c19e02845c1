import { describe, expect, expectTypeOf, it } from "vitest";
import {
	type ConnectorMetadata,
	type ErrorCode,
	KvferryError,
	type LoadStoreOp,
	type RequestMetadata,
	type WorkerAdapter,
	WorkerConnector,
} from "../../ts/index.js";

const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

const OP: LoadStoreOp = {
	tokenIds: range(0, 70),
	start: 0,
	end: 64,
	blockIds: [range(0, 4)],
	skipFirstNTokens: 16,
};

const LOAD: RequestMetadata = { requestId: "r", direction: "RETRIEVE", op: OP, cacheSalt: "" };

/** An adapter that writes down what it is handed. */
function recorder() {
	const calls: unknown[][] = [];
	const adapter: WorkerAdapter = {
		carriesSalt: true,
		registerKvCaches: async () => {},
		batchedSubmitRetrieveRequests: (...rest) => calls.push(["load", ...rest]),
		batchedSubmitStoreRequests: (...rest) => calls.push(["store", ...rest]),
		waitForLoads: async () => {
			calls.push(["waited"]);
		},
		waitForSaves: async () => {},
		getFinished: (ended) => [new Set(ended), new Set(["r"])],
		getBlockIdsWithLoadErrors: () => new Set(),
		shutdown: async () => {},
	};
	return { adapter, calls, connector: new WorkerConnector({ adapter }) };
}

describe("metadata as plain JSON", () => {
	it("means the same after a round trip", () => {
		const { connector, calls } = recorder();
		const metadata: ConnectorMetadata = {
			requests: [{ ...LOAD, cacheSalt: "tenant" }],
			loadAsync: true,
		};
		connector.bindConnectorMetadata(JSON.parse(JSON.stringify(metadata)));
		connector.startLoadKv();
		expect(calls).toEqual([["load", ["r"], [OP], ["tenant"]]]);
	});

	it("from a scheduler that knew no loadAsync loads between steps", () => {
		const { connector, calls } = recorder();
		connector.bindConnectorMetadata({ requests: [LOAD] });
		connector.startLoadKv();
		expect(calls).toEqual([["load", ["r"], [OP]]]);
		expect([...connector.getFinished(new Set())[1]]).toEqual(["r"]);
		expectTypeOf<{ requests: [] }>().toExtend<ConnectorMetadata>();
	});

	it("from a scheduler that knew no salts has none, which is no reason to refuse it", () => {
		const { adapter, calls } = recorder();
		const { cacheSalt: _, ...before } = LOAD;
		expectTypeOf(before).toExtend<RequestMetadata>();
		for (const request of [before, { ...before, cacheSalt: null }, { ...before, cacheSalt: "" }]) {
			for (const carriesSalt of [undefined, true]) {
				const connector = new WorkerConnector({ adapter: { ...adapter, carriesSalt } });
				connector.bindConnectorMetadata({ requests: [request] });
				connector.startLoadKv();
				expect(calls.splice(0)).toEqual([["load", ["r"], [OP]]]);
			}
		}
	});
});

describe("metadata that means nothing", () => {
	const detached = new Uint32Array(64);
	structuredClone(detached, { transfer: [detached.buffer] });
	const op = (change: object) => ({ requests: [{ ...LOAD, op: { ...OP, ...change } }] });
	it.each<[string, unknown, ErrorCode?]>([
		["metadata must be", undefined],
		["metadata must be", {}],
		["metadata must be", { requests: null }],
		["loadAsync of the metadata must be true or false", { requests: [], loadAsync: "no" }],
		["a request of the metadata must be an object", { requests: [null] }],
		["requestId of the metadata must be a string", { requests: [{ ...LOAD, requestId: 7 }] }],
		["direction of r is LOAD", { requests: [{ ...LOAD, direction: "LOAD" }] }],
		["direction of r is undefined", { requests: [{ ...LOAD, direction: undefined }] }],
		["op of r must be an object", { requests: [{ ...LOAD, op: undefined }] }],
		["tokenIds of r must be an array", op({ tokenIds: undefined })],
		["tokenIds of r was detached", op({ tokenIds: detached })],
		["start of r is -16", op({ start: -16 })],
		["start of r is 80: it must be an integer from 0 to 64", op({ start: 80 })],
		["start of r is of type undefined", op({ start: undefined })],
		["end of r is NaN", op({ end: Number.NaN })],
		["end of r is 128: it must be an integer from 0 to 70", op({ end: 128 })],
		["skipFirstNTokens of r is 65", op({ skipFirstNTokens: 65 })],
		["skipFirstNTokens of r is of type undefined", op({ skipFirstNTokens: undefined })],
		["blockIds of r must be an array", op({ blockIds: undefined })],
		["blockIds of r must be an array", op({ blockIds: [1, 2, 3, 4] })],
		["a block id of r is -1", op({ blockIds: [[0, 1, 2, -1]] })],
		["a block id of r is 4294967295", op({ blockIds: [[0, 1, 2, 2 ** 32 - 1]] })],
		["a salt must not contain '/'", { requests: [{ ...LOAD, cacheSalt: "a/b" }] }, "INVALID_SALT"],
		["cacheSalt must be a string", { requests: [{ ...LOAD, cacheSalt: 7 }] }, "INVALID_SALT"],
	])("is refused, and what was bound stays: %s", (message, metadata, code = "INVALID_ARGUMENT") => {
		const { connector, calls } = recorder();
		connector.bindConnectorMetadata({ requests: [LOAD] });
		// A good request before the bad one is not taken over alone.
		const bad = metadata as ConnectorMetadata;
		const both = Array.isArray(bad?.requests)
			? { ...bad, requests: [{ ...LOAD, requestId: "good" }, ...bad.requests] }
			: bad;
		for (const refused of [bad, both]) {
			const bind = () => connector.bindConnectorMetadata(refused);
			expect(bind).toThrow(KvferryError);
			expect(bind).toThrow(
				expect.objectContaining({ code, message: expect.stringContaining(message) }),
			);
		}
		connector.startLoadKv();
		expect(calls).toEqual([["load", ["r"], [OP]]]);
	});
});
