import { describe, expect, it } from "vitest";
import {
	blockHashes,
	ChunkHasher,
	chunkHashes,
	type ErrorCode,
	Hashes,
	type HashList,
	KvferryError,
	PrefixIndex,
} from "../ts/index.js";

/** Hashes of two bytes' difference, for the numbers given. */
function hashes(numbers: readonly number[], hashBytes = 32): Hashes {
	const bytes = new Uint8Array(numbers.length * hashBytes);
	const view = new DataView(bytes.buffer);
	numbers.forEach((number, at) => {
		view.setUint16(at * hashBytes + hashBytes - 2, number);
	});
	return new Hashes(bytes, hashBytes);
}

const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

function refusal(call: () => unknown): { code: ErrorCode; message: string } {
	try {
		call();
	} catch (error) {
		expect(error).toBeInstanceOf(KvferryError);
		return error as KvferryError;
	}
	throw new Error("nothing was thrown");
}

describe("a prefix index", () => {
	it("takes the hashes of events as they come, one by one", () => {
		const index = new PrefixIndex({ capacity: 100 });
		const all = hashes(range(0, 5));
		const each: Uint8Array[] = [...all];
		expect(index.insert(each).inserted).toBe(5);
		expect([...index.contains(all)]).toEqual([1, 1, 1, 1, 1]);
	});

	it("tells how much of each prompt is stored, from what the hashers give", () => {
		const index = new PrefixIndex({ capacity: 100 });
		const prompt = Uint32Array.from(range(0, 2048));
		const stored = new ChunkHasher().append(prompt.subarray(0, 1024));
		expect(index.insert(stored)).toEqual({ inserted: 4, evicted: hashes([]) });
		const other = chunkHashes(prompt.toReversed());
		const requests = [chunkHashes(prompt), other, stored, hashes([])];
		expect([...index.matchPrefixes(requests)]).toEqual([4, 0, 4, 0]);
		expect([...index.matchPrefixes(chunkHashes(prompt))]).toEqual([4]);
		expect([...index.matchPrefixes([])]).toEqual([]);
		expect(index.size).toBe(4);
	});

	it("takes the shorter hashes of xxhash blocks", () => {
		const index = new PrefixIndex({ capacity: 10, hashBytes: 16 });
		const blocks = blockHashes(range(0, 64), { algorithm: "xxhash_cbor", seed: "0" });
		expect(index.insert(blocks).inserted).toBe(4);
		expect([...index.matchPrefixes(blocks)]).toEqual([4]);
	});

	it("takes hashes of the package's other build", async () => {
		const other = await import("../ts/hash.js?build=cjs" as "../ts/hash.js");
		expect(other.Hashes).not.toBe(Hashes);
		const index = new PrefixIndex({ capacity: 10 });
		expect(index.insert(other.chunkHashes(Uint32Array.from(range(0, 512)))).inserted).toBe(2);
		const short = other.blockHashes(range(0, 64), { algorithm: "xxhash_cbor", seed: "0" });
		expect(() => index.insert(short)).toThrow(/^hashes of 16 bytes do not fit/);
	});

	it("takes many requests as one array with offsets, and writes where the caller says", () => {
		const index = new PrefixIndex({ capacity: 100 });
		index.insert(hashes([1, 2, 3, 4]));
		const { bytes } = hashes([1, 2, 9, 1, 9, 3, 1, 2, 3]);
		const into = new Uint32Array(6).fill(7);
		const counts = index.matchPrefixes(bytes, Uint32Array.of(0, 3, 5, 5, 9), into);
		expect([...counts]).toEqual([2, 1, 0, 4]);
		expect([...into]).toEqual([2, 1, 0, 4, 7, 7]);
	});

	it("reports what it forgets: the last chunks of the prompt used longest ago", () => {
		const index = new PrefixIndex({ capacity: 6 });
		index.insert(hashes([1, 2, 3]));
		index.insert(hashes([11, 12, 13]));
		expect([...index.matchPrefixes(hashes([1, 2, 3]))]).toEqual([3]);
		const { inserted, evicted } = index.insert([hashes([1, 2, 3, 4]), hashes([21])]);
		expect(inserted).toBe(2);
		expect(evicted.toHex()).toEqual(hashes([13, 12]).toHex());
		expect([...index.contains(hashes([11, 12, 13, 4, 21]))]).toEqual([1, 0, 0, 1, 1]);
		expect(index.size).toBe(6);
	});

	it("answers as a plain model, over many calls", () => {
		const index = new PrefixIndex({ capacity: 50, hashBytes: 8 });
		let model: number[] = []; // the youngest first
		const touch = (numbers: readonly number[]) => {
			model = [...new Set([...numbers, ...model])];
		};
		let state = 1;
		const below = (end: number) => {
			state = (Math.imul(state, 1103515245) + 12345) >>> 0;
			return (state >>> 8) % end;
		};
		for (let call = 0; call < 3000; call++) {
			const start = below(12) * 10;
			const prompt = range(start, start + below(40));
			const list = hashes(prompt, 8);
			switch (below(4)) {
				case 0: {
					const fresh = prompt.filter((number) => !model.includes(number)).length;
					touch(prompt);
					const evicted = hashes(model.splice(50).reverse(), 8);
					expect(index.insert(list)).toEqual({ inserted: fresh, evicted });
					break;
				}
				case 1: {
					const gone = prompt.slice(-3);
					const there = gone.filter((number) => model.includes(number)).length;
					expect(index.remove(hashes(gone, 8))).toBe(there);
					model = model.filter((number) => !gone.includes(number));
					break;
				}
				default: {
					const missing = prompt.findIndex((number) => !model.includes(number));
					const prefix = missing < 0 ? prompt : prompt.slice(0, missing);
					expect(index.matchPrefixes(list)[0]).toBe(prefix.length);
					touch(prefix);
				}
			}
			expect(index.size).toBe(model.length);
		}
	});

	it("forgets what is removed, and everything when cleared", () => {
		const index = new PrefixIndex({ capacity: 10 });
		index.insert(hashes([1, 2, 3]));
		expect(index.remove([hashes([2, 2]), hashes([9])])).toBe(1);
		expect([...index.matchPrefixes(hashes([1, 2, 3]))]).toEqual([1]);
		index.clear();
		expect(index.size).toBe(0);
		expect([...index.contains(hashes([1, 3]))]).toEqual([0, 0]);
	});

	it("reads hashes in shared memory", () => {
		const index = new PrefixIndex({ capacity: 10 });
		const shared = new Uint8Array(new SharedArrayBuffer(64));
		shared.set(hashes([1, 2]).bytes);
		expect(index.insert(shared).inserted).toBe(2);
		expect([...index.matchPrefixes(hashes([1, 2]))]).toEqual([2]);
	});
});

describe("what a prefix index cannot use", () => {
	const index = new PrefixIndex({ capacity: 4 });
	index.insert(hashes([1, 2, 3, 4]));
	const two = hashes([1, 2]);
	const into = new Uint32Array(4);
	const detached = new Uint8Array(32);
	structuredClone(detached, { transfer: [detached.buffer] });

	it.each<[string, () => unknown]>([
		["capacity is 0", () => new PrefixIndex({ capacity: 0 })],
		["capacity is 1.5", () => new PrefixIndex({ capacity: 1.5 })],
		["capacity is 268435457", () => new PrefixIndex({ capacity: 2 ** 28 + 1 })],
		["capacity is of type undefined", () => new PrefixIndex({} as never)],
		["20 bytes are not offered", () => new PrefixIndex({ capacity: 1, hashBytes: 20 })],
		["hashBytes is 64", () => new PrefixIndex({ capacity: 1, hashBytes: 64 })],
		["hashes of 16 bytes do not fit", () => index.insert(hashes([1], 16))],
		["hashes of 16 bytes do not fit", () => index.matchPrefixes([two, hashes([1], 16)])],
		["33 bytes are no whole number", () => index.remove(new Uint8Array(33))],
		["hashes are of type string", () => index.contains("00" as unknown as HashList)],
		["hashes are of type undefined", () => index.contains([undefined] as never)],
		["detached", () => index.insert(detached)],
		["offsets must be a Uint32Array", () => index.matchPrefixes(two, [0, 2] as never)],
		["offsets are empty", () => index.matchPrefixes(two, new Uint32Array())],
		["first offset is 1", () => index.matchPrefixes(two, Uint32Array.of(1, 2))],
		["position 2 is 0, after 1", () => index.matchPrefixes(two, Uint32Array.of(0, 1, 0, 2))],
		["last offset is 3", () => index.matchPrefixes(two, Uint32Array.of(0, 3))],
		["last offset is 1", () => index.matchPrefixes(two, Uint32Array.of(0, 1))],
		["room for 4 counts", () => index.matchPrefixes([two, two, two, two, two], undefined, into)],
		[
			"share its buffer",
			() => index.matchPrefixes(new Uint8Array(into.buffer, 0, 0), undefined, into),
		],
	])("is named, and nothing changes: %s", (message, call) => {
		expect(refusal(call)).toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining(message),
		});
		expect([...index.contains(hashes([1, 2, 3, 4]))]).toEqual([1, 1, 1, 1]);
		expect(index.size).toBe(4);
	});
});
