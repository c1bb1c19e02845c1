import { describe, expect, it } from "vitest";
import { explainMiss } from "../../ts/cli/miss.js";
import type { MissingChunk } from "../../ts/native-binding.js";

const UNKNOWN: MissingChunk = {
	chunkHash: "00",
	missingRanks: [],
	writingRanks: [],
	otherSalts: 0,
	otherModels: [],
	otherWorldSizes: [],
	otherLayouts: [],
	logSinceMs: 1000,
};

function reasons(known: Partial<MissingChunk>, status = {}): string[] {
	const missing = { ...UNKNOWN, ...known };
	const explanation = { chunks: 4, hitChunks: 2, registered: true, missing };
	const tokens = new Uint32Array(70);
	const question = { modelName: "mine", kvWorldSize: 4, tokens, cacheSalt: "" };
	return explainMiss(explanation, missing, question, 16, status);
}

describe("a miss", () => {
	it("begins at a chunk whose tokens are told", () => {
		expect(reasons({})[0]).toBe(
			"2 of 4 whole chunks hit. The first that does not is chunk 2 (tokens 32 to 47).",
		);
	});

	it.each<[Partial<MissingChunk>, RegExp]>([
		[{ writingRanks: [0, 2] }, /written right now, by KV rank 0, 2/],
		[{ missingRanks: [1, 3] }, /KV rank 1, 3 of 4 does not have it/],
		[{ otherSalts: 2 }, /under another salt \(2 of them\): ask with the --salt/],
		[{ otherModels: ["a", "b"] }, /for another model \(a, b\), not for mine/],
		[{ otherWorldSizes: [2, 8] }, /for a KV world size of 2, 8, not of 4/],
		[{ otherLayouts: [{ shape: [2, 16], dtype: "half" }] }, /another layout \(2 × 16 half\)/],
		[{ removed: { cause: "evicted", atMs: 0 } }, /evicted at 1970-01-01T00:00:00.000Z/],
		[
			{ removed: { cause: "evicted", atMs: 0, by: { tenant: "2a", own: false } } },
			/evicted at 1970.* to make room for what the tenant 2a stored/,
		],
		[
			{ removed: { cause: "evicted", atMs: 0, by: { tenant: "2a", own: true } } },
			/evicted at 1970.* to make room for what the same tenant stored/,
		],
		[{ removed: { cause: "cleared", atMs: 0 } }, /at 1970.*cleared/],
		[{ removed: { cause: "damaged", atMs: 0 } }, /dropped at 1970.*other bytes than were stored/],
		[{}, /never stored, as far as the server knows: .* back to 1970-01-01T00:00:01.000Z\.$/],
	])("is explained by %j", (known, words) => {
		expect(reasons(known)).toEqual([expect.any(String), expect.stringMatching(words)]);
	});

	it("may have several reasons", () => {
		const [, ...several] = reasons({ otherSalts: 1, removed: { cause: "evicted", atMs: 0 } });
		expect(several).toEqual([expect.stringMatching(/salt/), expect.stringMatching(/evicted/)]);
	});

	it("may be for want of room", () => {
		expect(reasons({}, { refused_chunks: 7 })[1]).toMatch(/7 chunks were refused for want of room/);
		expect(reasons({}, { refused_chunks: 0 })[1]).not.toMatch(/room/);
		expect(reasons({}, { refused_growing_chunks: 7 })[1]).toMatch(
			/; 7 chunks came faster than its memory grows\.$/,
		);
	});
});
