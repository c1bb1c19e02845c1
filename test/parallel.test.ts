import { describe, expect, expectTypeOf, it } from "vitest";
import {
	KvferryError,
	type ParallelismOptions,
	ParallelStrategy,
	strategyOf,
} from "../ts/index.js";

const world = (tensorParallelSize: number, pipelineParallelSize: number, useMla: boolean) =>
	Array.from({ length: tensorParallelSize * pipelineParallelSize }, (_, rank) =>
		ParallelStrategy.of({ tensorParallelSize, pipelineParallelSize, rank, useMla }),
	);

function refusal(call: () => unknown): string {
	try {
		call();
	} catch (error) {
		expect(error).toBeInstanceOf(KvferryError);
		expect((error as KvferryError).code).toBe("INVALID_ARGUMENT");
		return (error as KvferryError).message;
	}
	throw new Error("nothing was thrown");
}

describe("a parallel strategy", () => {
	it("lets every rank store its own piece without MLA", () => {
		const ranks = world(2, 2, false);
		expect(ranks.map(({ kvWorldSize }) => kvWorldSize)).toEqual([4, 4, 4, 4]);
		expect(ranks.map(({ kvWorkerId }) => kvWorkerId)).toEqual([0, 1, 2, 3]);
		expect(ranks.every(({ storesKv, numKvReaders }) => storesKv && numKvReaders === 1)).toBe(true);
	});

	it("stores what all ranks of a tensor-parallel group have once under MLA, not once a rank", () => {
		const ranks = world(4, 2, true);
		expect(ranks.map(({ kvWorkerId }) => kvWorkerId)).toEqual([0, 0, 0, 0, 1, 1, 1, 1]);
		expect(ranks.flatMap(({ storesKv, rank }) => (storesKv ? [rank] : []))).toEqual([0, 4]);
		expect(ranks.flatMap((it) => (it.isFirstRankOfTpGroup ? [it.rank] : []))).toEqual([0, 4]);
	});

	it("counts every reader under MLA, so that the first does not end the lease of the others", () => {
		expect(world(4, 2, true).map(({ numKvReaders }) => numKvReaders)).toEqual(Array(8).fill(4));
	});

	it("treats MLA in a hybrid model as none", () => {
		const hybrid = { tensorParallelSize: 2, rank: 1, useMla: true, isHybrid: true };
		expect(ParallelStrategy.of(hybrid)).toMatchObject({ useMla: false, storesKv: true });
	});

	it("is recognised across the two builds of the package", async () => {
		const { ParallelStrategy: Other } = await import(
			"../ts/parallel.js?build=cjs" as "../ts/parallel.js"
		);
		expect(Other).not.toBe(ParallelStrategy);
		const parallelStrategy = Other.tensorParallel(2, 1);
		expect(strategyOf({ parallelStrategy })).toBe(parallelStrategy);
		expect(parallelStrategy).toBeInstanceOf(ParallelStrategy);
		expect({ ...parallelStrategy }).not.toBeInstanceOf(ParallelStrategy);
	});

	it("has names for the plain cases", () => {
		expect(ParallelStrategy.single()).toMatchObject({
			worldSize: 1,
			kvWorldSize: 1,
			storesKv: true,
		});
		expect(ParallelStrategy.tensorParallel(4, 3, true)).toMatchObject({ kvWorldSize: 1, rank: 3 });
		expect(ParallelStrategy.pipelineParallel(3, 2)).toMatchObject({
			kvWorldSize: 3,
			kvWorkerId: 2,
		});
	});

	it("refuses what does not fit together by name", () => {
		const of = (options: object) => refusal(() => ParallelStrategy.of(options));
		expect(of({ tensorParallelSize: 2, rank: 2 })).toMatch(/rank 2 is not one of the 2/);
		expect(of({ tensorParallelSize: 2, pipelineParallelSize: 2, rank: 4 })).toMatch(
			/rank 4 is not one of the 4/,
		);
		expect(of({ rank: -1 })).toMatch(/rank is -1/);
		expect(of({ rank: Number.NaN })).toMatch(/rank is NaN/);
		expect(of({ pipelineParallelSize: -2 })).toMatch(/pipelineParallelSize is -2/);
		expect(of({ numServers: 0 })).toMatch(/numServers is 0/);
		expect(of({ tensorParallelSize: 4, numServers: 3 })).toMatch(/3 servers/);
		expect(of({ tensorParallelSize: 4, decodeContextParallelSize: 3 })).toMatch(/3 token shards/);
		expect(of({ tensorParallelSize: 0 })).toMatch(/tensorParallelSize is 0/);
		expect(of({ tensorParallelSize: 1.5 })).toMatch(/tensorParallelSize is 1.5/);
		expect(of({ tensorParallelSize: 256 })).toMatch(/255/);
		expect(of({ useMla: 1 })).toMatch(/useMla is 1: it must be true or false/);
		expect(refusal(() => ParallelStrategy.tensorParallel(2, undefined as never))).toMatch(
			/rank is/,
		);
		expect(refusal(() => ParallelStrategy.pipelineParallel(2, undefined as never))).toMatch(
			/rank is/,
		);
		expect(of({ tensorParallelSiz: 2 })).toMatch(/did you mean tensorParallelSize/);
	});
});

describe("the former loose parameters", () => {
	it("still make a strategy: no MLA, and every rank stores", () => {
		const strategy = strategyOf({ kvWorldSize: 4, kvWorkerId: 3, blockSize: 16 });
		expect(strategy).toMatchObject({ kvWorldSize: 4, kvWorkerId: 3, storesKv: true });
		expect(strategyOf({})).toMatchObject({ kvWorldSize: 1 });
	});

	it("may stand beside a strategy only when they say the same", () => {
		const parallelStrategy = ParallelStrategy.tensorParallel(2, 1);
		expect(strategyOf({ parallelStrategy, kvWorldSize: 2, kvWorkerId: 1 })).toBe(parallelStrategy);
		expect(refusal(() => strategyOf({ parallelStrategy, kvWorldSize: 4 }))).toMatch(/4.*2/);
	});

	it("need a block size and each other", () => {
		for (const options of [
			{ kvWorldSize: 4, kvWorkerId: 3 },
			{ kvWorldSize: 4, kvWorkerId: 3, blockSize: null },
			{ kvWorldSize: 4, blockSize: 16 },
		]) {
			expect(refusal(() => strategyOf(options as never))).toMatch(/go together/);
		}
		const beyond = { kvWorldSize: 4, kvWorkerId: 4, blockSize: 16 };
		expect(refusal(() => strategyOf(beyond))).toMatch(/kvWorkerId is 4/);
		expect(refusal(() => strategyOf({ ...beyond, kvWorkerId: -1 }))).toMatch(/kvWorkerId is -1/);
		expect(refusal(() => strategyOf({ ...beyond, kvWorldSize: 0 }))).toMatch(/kvWorldSize is 0/);
		expect(refusal(() => strategyOf({ ...beyond, blockSize: -16 }))).toMatch(/blockSize is -16/);
		expect(refusal(() => strategyOf({ parallelStrategy: {} as never }))).toMatch(
			/ParallelStrategy/,
		);
	});

	it("are told apart by their types", () => {
		expectTypeOf<{ kvWorldSize: 4; kvWorkerId: 3; blockSize: 16 }>().toExtend<ParallelismOptions>();
		expectTypeOf<{ parallelStrategy: ParallelStrategy }>().toExtend<ParallelismOptions>();
		expectTypeOf<{ kvWorldSize: 4; kvWorkerId: 3 }>().not.toExtend<ParallelismOptions>();
		expectTypeOf<{ kvWorldSize: 4; blockSize: 16 }>().not.toExtend<ParallelismOptions>();
	});
});
