import { describe, expect, it } from "vitest";
import { KvferryError, type StepArrays, TrackerTable } from "../ts/index.js";

function step(
	rows: readonly { handle: number; scheduled: number; tokens: number; blocks?: number[] }[],
): StepArrays {
	const offsets = [0];
	const blockIds = rows.flatMap(({ blocks = [] }) => {
		offsets.push((offsets.at(-1) as number) + blocks.length);
		return blocks;
	});
	return {
		handles: Uint32Array.from(rows, ({ handle }) => handle),
		scheduledTokens: Uint32Array.from(rows, ({ scheduled }) => scheduled),
		numTokens: Uint32Array.from(rows, ({ tokens }) => tokens),
		blockOffsets: Uint32Array.from(offsets),
		blockIds: Uint32Array.from(blockIds),
	};
}

const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

function refusal(call: () => unknown): KvferryError {
	try {
		call();
	} catch (error) {
		expect(error).toBeInstanceOf(KvferryError);
		return error as KvferryError;
	}
	throw new Error("nothing was thrown");
}

describe("a tracker table", () => {
	it("plans what is loaded and stored, and shows each request as it stands", () => {
		const table = new TrackerTable({ chunkSize: 64, blockSize: 16, numBlocks: 100 });
		const loading = table.add({ requestId: "a", numTokens: 150, cacheSalt: "tenant" });
		table.setHits("a", 16, 64);
		expect(table.allocate("a", range(0, 10), true)).toBe("WAITING_FOR_LOAD");
		expect(loading).toMatchObject({
			state: "WAITING_FOR_LOAD",
			cacheSalt: "tenant",
			numLocalHitBlocks: 1,
			numExternalHitBlocks: 4,
			numStoredBlocks: 4,
			needsRetrieve: true,
			numAllocatedBlocks: 10,
			allocatedBlockIds: [range(0, 10)],
		});
		const storing = table.add({ requestId: "b", numTokens: 128 });
		table.allocate("b", [], false);
		const { handle } = storing;
		const plan = table.plan(step([{ handle, scheduled: 128, tokens: 128, blocks: range(20, 28) }]));
		expect([...plan]).toEqual([
			{
				handle: loading.handle,
				direction: "RETRIEVE",
				start: 0,
				end: 64,
				skipFirstNTokens: 16,
				blockIds: [range(0, 4)],
			},
			{
				handle,
				direction: "STORE",
				start: 0,
				end: 128,
				skipFirstNTokens: 0,
				blockIds: [range(20, 28)],
			},
		]);
		expect(loading.state).toBe("READY");
		expect(storing).toMatchObject({ numScheduledTokens: 128, numStoredTokens: 128 });
		expect(table.get(handle)?.requestId).toBe("b");
		table.remove("b");
		table.remove("b");
		expect([table.size, table.get("b")]).toEqual([1, undefined]);
		expect(refusal(() => storing.state).code).toBe("INVALID_ARGUMENT");
	});

	it("counts the blocks of the first group that is stored", () => {
		const table = new TrackerTable({ chunkSize: 64, blockSize: [0, 16, 32] });
		const blockIds = [[], range(0, 10), range(20, 25)];
		const tracker = table.add({ requestId: "a", numTokens: 150, numStoredTokens: 64, blockIds });
		expect(tracker).toMatchObject({ numAllocatedBlocks: 10, numStoredBlocks: 4 });
	});

	it("plans more than its arrays held before", () => {
		const table = new TrackerTable({ chunkSize: 4, blockSize: 1 });
		const rows = range(0, 300).map((i) => {
			const { handle } = table.add({ requestId: `r${i}`, numTokens: 40 });
			return { handle, scheduled: 40, tokens: 40, blocks: range(0, 40) };
		});
		const plan = table.plan(step(rows));
		expect(plan.length).toBe(300);
		expect([...plan].at(-1)?.blockIds).toEqual([range(0, 40)]);
	});

	it("refuses bad input by name and stays as it was", () => {
		const table = new TrackerTable({ chunkSize: 64, blockSize: 16, numBlocks: 100 });
		const tracker = table.add({ requestId: "a", numTokens: 150 });
		table.allocate("a", range(0, 10), false);
		const { handle } = tracker;
		const detached = new Uint32Array(10);
		structuredClone(detached, { transfer: [detached.buffer] });
		const refused: [() => unknown, RegExp][] = [
			[() => new TrackerTable({ chunkSize: 100, blockSize: 16 }), /100.*16/],
			[() => new TrackerTable({ chunkSise: 64 } as object), /did you mean chunkSize/],
			[() => new TrackerTable({ chunkSize: -1 }), /chunkSize is -1/],
			[() => new TrackerTable({ chunkSize: Number.NaN }), /chunkSize is NaN/],
			[() => new TrackerTable({ chunkSize: 0 }), /chunkSize is 0/],
			[() => new TrackerTable({ chunkSize: 64, blockSize: [16, 24] }), /64.*24/],
			[() => new TrackerTable({ blockSize: 1.5 }), /blockSize is 1.5/],
			[() => new TrackerTable({ blockSize: null as never }), /blockSize must be/],
			[() => new TrackerTable({ blockSize: "16" as never }), /blockSize must be/],
			[() => new TrackerTable({ numBlocks: 0 }), /numBlocks is 0/],
			[() => table.add({ requestId: "a", numTokens: 1 }), /a is tracked already/],
			[() => table.add({ requestId: 7 as never, numTokens: 1 }), /requestId must be a string/],
			...(
				[
					"numTokens",
					"maxStoredTokens",
					"numScheduledTokens",
					"numLocalHitTokens",
					"numExternalHitTokens",
					"numStoredTokens",
				] as const
			).flatMap((name) =>
				[-1, 0.5, Number.NaN, 2 ** 32].map((count): [() => unknown, RegExp] => [
					() => table.add({ requestId: "b", numTokens: 1, [name]: count }),
					new RegExp(`${name} is ${count}`),
				]),
			),
			[
				() => table.add({ requestId: "b", numTokens: 1, state: "DONE" as never }),
				/state is not one of PREFETCHING/,
			],
			[
				() => table.add({ requestId: "b", numTokens: 1, blockIds: [100] }),
				/block 100 is not below/,
			],
			[() => table.add({ requestId: "b", numTokens: 1, blockIds: [-1] }), /block id is -1/],
			[() => table.allocate("b", [], false), /request b/],
			[() => table.bypass("b"), /request b/],
			[() => table.setHits("b", 0, 0), /request b/],
			[() => table.setHits("a", -1, 0), /numLocalHitTokens is -1/],
			[() => table.setHits("a", 0, 65), /65 tokens is not a whole number of chunks/],
			[() => table.allocate("a", [...range(0, 10), 100], false), /block 100/],
			[() => table.allocate("a", [...range(0, 10), -1], false), /block id is -1/],
			[() => table.allocate("a", [...range(0, 10), Number.NaN], false), /block id is NaN/],
			[() => table.allocate("a", [1], false), /has 10 blocks and was allocated 1/],
			[() => table.allocate("a", [[1], [2]], false), /2 groups/],
			[() => table.allocate("a", null as never, false), /blockIds must be an array/],
			[
				() => table.allocate("a", [range(0, 10), null] as never, false),
				/blockIds must be an array/,
			],
			[() => table.allocate("a", detached, false), /blockIds was detached/],
			[
				() => table.plan(step([{ handle, scheduled: 64, tokens: 150, blocks: [100] }])),
				/block 100 is not below 100/,
			],
			[() => table.plan(step([{ handle: 7, scheduled: 1, tokens: 1 }])), /request 7/],
			[
				() =>
					table.plan(
						step([
							{ handle, scheduled: 64, tokens: 150, blocks: [10] },
							{ handle: 7, scheduled: 64, tokens: 150 },
						]),
					),
				/request 7/,
			],
			[
				() => table.plan(step([1, 2].map(() => ({ handle, scheduled: 64, tokens: 150 })))),
				new RegExp(`request ${handle} is in the step twice`),
			],
			[() => table.plan({ ...step([]), handles: [] as never }), /handles must be a Uint32Array/],
		];
		for (const [call, message] of refused) {
			const { code, message: words } = refusal(call);
			expect([code, words]).toEqual(["INVALID_ARGUMENT", expect.stringMatching(message)]);
		}
		for (const cacheSalt of ["\ud800", "a/b", "x".repeat(129), 7 as never]) {
			const { code } = refusal(() => table.add({ requestId: "c", numTokens: 1, cacheSalt }));
			expect(code).toBe("INVALID_SALT");
		}
		expect(tracker).toMatchObject({ numScheduledTokens: 0, numStoredTokens: 0, state: "READY" });
		expect(tracker.allocatedBlockIds).toEqual([range(0, 10)]);
		expect(table.size).toBe(1);
		const plan = table.plan(step([{ handle, scheduled: 150, tokens: 150 }]));
		expect([...plan].map(({ start, end, blockIds }) => [start, end, ...blockIds])).toEqual([
			[0, 128, range(0, 8)],
		]);
	});
});
