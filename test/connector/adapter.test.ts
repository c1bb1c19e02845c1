import { describe, expect, expectTypeOf, it } from "vitest";
import {
	type CacheAdapterOptions,
	type ConnectorMetadata,
	createSchedulerAdapter,
	createWorkerAdapter,
	type EngineRequest,
	type LoadStoreOp,
	ParallelStrategy,
	type SchedulerAdapter,
	SchedulerConnector,
	Server,
	type WorkerAdapter,
	WorkerConnector,
	type WorkerConnectorOptions,
} from "../../ts/index.js";

const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

/** As such classes were written before salts, events and resets. */
class FormerScheduler implements SchedulerAdapter {
	readonly chunkSize = 64;
	readonly calls: unknown[][] = [];
	maybeSubmitLookupRequest(requestId: string, tokenIds: readonly number[] | Uint32Array): void {
		this.calls.push(["lookup", requestId, tokenIds.length]);
	}
	checkLookupResult(_requestId: string): number | null {
		return 64;
	}
	cleanupLookupResult(_requestId: string): void {}
	freeLookupLocks(
		requestId: string,
		_tokenIds: readonly number[] | Uint32Array,
		start: number,
		end: number,
	): void {
		this.calls.push(["free", requestId, start, end]);
	}
	endSession(requestId: string): void {
		this.calls.push(["end", requestId]);
	}
}

class FormerWorker implements WorkerAdapter {
	readonly calls: unknown[][] = [];
	async registerKvCaches(): Promise<void> {}
	batchedSubmitRetrieveRequests(requestIds: readonly string[], ops: readonly LoadStoreOp[]): void {
		this.calls.push(["load", requestIds, ops.length]);
	}
	batchedSubmitStoreRequests(requestIds: readonly string[], ops: readonly LoadStoreOp[]): void {
		this.calls.push(["store", requestIds, ops.length]);
	}
	async waitForLoads(): Promise<void> {}
	async waitForSaves(): Promise<void> {}
	getFinished(ended: ReadonlySet<string>): [Set<string>, Set<string>] {
		return [new Set(ended), new Set()];
	}
	getBlockIdsWithLoadErrors(): Set<number> {
		return new Set();
	}
	async shutdown(): Promise<void> {}
}

describe("adapters from before salts", () => {
	it("serve requests without a salt as they did, all the way", async () => {
		const [scheduling, working] = [new FormerScheduler(), new FormerWorker()];
		const warnings: string[] = [];
		const onWarning = (text: string) => warnings.push(text);
		const scheduler = new SchedulerConnector({ adapter: scheduling, onWarning });
		const worker = new WorkerConnector({ adapter: working, onWarning });
		const request: EngineRequest = { requestId: "r", allTokenIds: range(0, 150) };
		expect(scheduler.getNumNewMatchedTokens(request, 16)).toEqual([48, true]);
		scheduler.updateStateAfterAlloc(request, range(0, 10), 48);
		const output = { scheduledNewReqs: [], scheduledCachedReqs: [], numScheduledTokens: {} };
		worker.bindConnectorMetadata(scheduler.buildConnectorMeta(output));
		worker.startLoadKv();
		scheduler.updateStateAfterAlloc(request, range(0, 10), 0);
		const first = { ...output, scheduledNewReqs: [request], numScheduledTokens: { r: 86 } };
		worker.bindConnectorMetadata(scheduler.buildConnectorMeta(first));
		await worker.waitForSave();
		expect(scheduler.requestFinished(request)).toEqual([true, null]);
		expect(scheduling.calls).toEqual([
			["lookup", "r", 150],
			["free", "r", 0, 16],
			["end", "r"],
		]);
		expect(working.calls).toEqual([
			["load", ["r"], 1],
			["store", ["r"], 1],
		]);
		expect(scheduler.takeEvents()).toBeUndefined();
		expect(await scheduler.resetCache()).toBe(false);
		expect(warnings).toEqual([]);
	});

	it("never see a request with a salt, as they would drop it, whatever they do with their arguments", async () => {
		class Longer extends FormerWorker {
			override batchedSubmitStoreRequests(
				requestIds: readonly string[],
				ops: readonly LoadStoreOp[],
				_priority?: unknown,
			): void {
				super.batchedSubmitStoreRequests(requestIds, ops);
			}
		}
		expect(Longer.prototype.batchedSubmitStoreRequests).toHaveLength(3);
		const [scheduling, working] = [new FormerScheduler(), new Longer()];
		const warnings: string[] = [];
		const onWarning = (text: string) => warnings.push(text);
		const scheduler = new SchedulerConnector({ adapter: scheduling, onWarning });
		const worker = new WorkerConnector({ adapter: working, onWarning });
		const request = { requestId: "r", allTokenIds: range(0, 150), cacheSalt: "tenant" };
		expect(scheduler.getNumNewMatchedTokens(request, 0)).toEqual([0, false]);
		const op = {
			tokenIds: range(0, 64),
			start: 0,
			end: 64,
			blockIds: [range(0, 4)],
			skipFirstNTokens: 0,
		};
		const metadata: ConnectorMetadata = {
			requests: [{ requestId: "r", direction: "STORE", op, cacheSalt: "tenant" }],
			loadAsync: true,
		};
		worker.bindConnectorMetadata(metadata);
		await worker.waitForSave();
		expect([...scheduling.calls, ...working.calls]).toEqual([]);
		expect(warnings).toHaveLength(2);
	});

	it("have the types that they had", () => {
		expectTypeOf<FormerScheduler>().toExtend<SchedulerAdapter>();
		expectTypeOf<FormerWorker>().toExtend<WorkerAdapter>();
		type Optional = "carriesSalt" | "reportBlockAllocations" | "takeEvents" | "resetCache";
		expectTypeOf<Omit<SchedulerAdapter, Optional>>().toExtend<SchedulerAdapter>();
		expectTypeOf<Omit<WorkerAdapter, "carriesSalt">>().toExtend<WorkerAdapter>();
		expectTypeOf<{ requestId: string; allTokenIds: number[] }>().toExtend<EngineRequest>();
	});
});

describe("options from before ParallelStrategy", () => {
	it("are taken by connectors and adapters, and go together", () => {
		type Former = { kvWorldSize: number; kvWorkerId: number; blockSize: number };
		expectTypeOf<Former & { adapter: WorkerAdapter }>().toExtend<WorkerConnectorOptions>();
		expectTypeOf<Former & { mqTimeout: number }>().toExtend<
			Omit<CacheAdapterOptions, "via" | "modelName">
		>();
		const adapter = new FormerWorker();
		const { parallelStrategy } = new WorkerConnector({
			adapter,
			kvWorldSize: 4,
			kvWorkerId: 3,
			blockSize: 16,
		});
		expect(parallelStrategy).toMatchObject({ kvWorldSize: 4, kvWorkerId: 3, storesKv: true });
		expect(new WorkerConnector({ adapter }).parallelStrategy.kvWorldSize).toBe(1);
		// @ts-expect-error the block size is missing
		expect(() => new WorkerConnector({ adapter, kvWorldSize: 4, kvWorkerId: 3 })).toThrow(
			/blockSize go together/,
		);
		const strategy = ParallelStrategy.tensorParallel(2, 1);
		const options = { adapter, parallelStrategy: strategy, kvWorldSize: 4, blockSize: 16 };
		expect(() => new WorkerConnector(options)).toThrow(/kvWorldSize 4/);
	});
});

describe("options", () => {
	const via = "tcp://127.0.0.1:9";

	it.each([
		["m@1", /'@'/],
		["", /modelName is empty/],
		["m".repeat(4097), /4096/],
	])("name no model that no key can hold (%#)", async (modelName, message) => {
		await using via = await Server.start({ listen: false, memory: 2 ** 20 });
		for (const create of [createSchedulerAdapter, createWorkerAdapter]) {
			expect(() => create({ via, modelName })).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringMatching(message),
				}),
			);
		}
	});

	it.each([
		["createSchedulerAdapter", createSchedulerAdapter, { via, model: "m" }, "model", "modelName"],
		["createWorkerAdapter", createWorkerAdapter, { via, Verify: "always" }, "Verify", "verify"],
		[
			"SchedulerConnector",
			(options: never) => new SchedulerConnector(options),
			{ adapter: new FormerScheduler(), blocksize: 8 },
			"blocksize",
			"blockSize",
		],
		[
			"WorkerConnector",
			(options: never) => new WorkerConnector(options),
			{ adapter: new FormerWorker(), warning: () => {} },
			"warning",
			"onWarning",
		],
	] as const)("that %s does not know are refused", (of, make, options, wrong, meant) => {
		expect(() => make(options as never)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: `${of} has no option "${wrong}": did you mean ${meant}?`,
			}),
		);
	});

	it.each([
		["a text", via, `via is "${via}"`],
		["a promise", Promise.resolve(), "via is a promise, await it"],
		["nothing", undefined, "via is missing"],
		["null", null, "via is null"],
		["another object", { url: via }, "via is of type object"],
	])("name a via that is %s, and what to give", (_, wrong, message) => {
		for (const make of [createSchedulerAdapter, createWorkerAdapter]) {
			expect(() => make({ via: wrong as never, modelName: "m" })).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringMatching(
						new RegExp(`^${message}.*: give await Client\\.connect\\(\\{ url \\}\\)`),
					),
				}),
			);
		}
	});

	it("show no password of an address that was given for a client", () => {
		for (const secret of ["secret", "long".repeat(50), "two\nlines"]) {
			const via = `redis://user:${secret}@host` as never;
			expect(() => createSchedulerAdapter({ via, modelName: "m" })).toThrow(
				/^via is "redis:\/\/…@host"/,
			);
		}
	});

	it("name an adapter that is missing", () => {
		expect(() => new SchedulerConnector({} as never)).toThrow(/^adapter is missing: give create/);
		expect(() => new WorkerConnector({} as never)).toThrow(/^adapter is missing: give create/);
	});
});
