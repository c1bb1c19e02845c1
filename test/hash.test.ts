import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import {
	type BlockAlgorithm,
	BlockHasher,
	type BlockHasherOptions,
	blockHashes,
	ChunkHasher,
	chunkHashes,
	eventHash,
	Hashes,
	type MmFeature,
	objectKey,
	packGroupId,
	type Tokens,
	unpackGroupId,
} from "../ts/hash.js";

interface Vectors {
	vectors: { chunk_size: number; tokens: number[]; hashes: string[] }[];
}

interface BlockVectors {
	cases: {
		PYTHONHASHSEED: string | null;
		block_size: number;
		token_ids: number[];
		append_tokens: number[];
		cache_salt: string | null;
		lora: { name: string; path: string } | null;
		mm_features: MmFeature[];
		prompt_embeds: { dtype: string; shape: [number, number]; raw_hex: string } | null;
		lookahead: number;
		block_hashes: Record<string, string[]>;
	}[];
}

function readJson(path: string) {
	return JSON.parse(readFileSync(new URL(path, import.meta.url), "utf8"));
}

const recorded: Vectors = readJson("./wire/chunk_hash_vectors.json");
const vllm: BlockVectors = readJson("./vectors/block_hash.json");
const tokens = Uint32Array.from({ length: 100 }, (_, at) => at * 7919);

function code(expected: string, message: RegExp) {
	return expect.objectContaining({ code: expected, message: expect.stringMatching(message) });
}

describe("chunk hashes", () => {
	it("are those of a recorded LMCache server, whatever holds the tokens", () => {
		for (const { chunk_size: chunkSize, tokens, hashes } of recorded.vectors) {
			const shared = new Uint32Array(new SharedArrayBuffer(tokens.length * 4));
			shared.set(tokens);
			const forms: Tokens[] = [tokens, tokens.map(BigInt), Uint32Array.from(tokens), shared];
			for (const form of forms) {
				expect(chunkHashes(form, { chunkSize }).toHex()).toEqual(hashes);
			}
		}
	});

	it("take 256 tokens unless told otherwise, and only complete chunks have one", () => {
		const prompt = new Uint32Array(600);
		expect(chunkHashes(prompt)).toEqual(
			chunkHashes(prompt, { chunkSize: 256, algorithm: "blake3" }),
		);
		expect(chunkHashes(prompt).length).toBe(2);
		expect(chunkHashes([]).length).toBe(0);
	});

	it("of sha256_cbor take integers of any size and sign", () => {
		const huge = chunkHashes([2 ** 32, -1, Number.MAX_SAFE_INTEGER], {
			chunkSize: 1,
			algorithm: "sha256_cbor",
		});
		expect(huge.toHex()[0]).toBe(
			"28adbb31df3db6f4f785f42dc759b8ff872b9fe5c9cd5ed66f79e3c9c976b0f0",
		);
		expect(huge).toEqual(
			chunkHashes([2n ** 32n, -1n, 2n ** 53n - 1n], { chunkSize: 1, algorithm: "sha256_cbor" }),
		);
	});
});

describe("block hashes", () => {
	it("are 32 bytes, 16 with xxhash", () => {
		expect(blockHashes(tokens).bytes.length).toBe(6 * 32);
		expect(blockHashes(tokens, { algorithm: "xxhash", seed: "0" }).bytes.length).toBe(6 * 16);
		expect(blockHashes(tokens, { algorithm: "xxhash_cbor", seed: "0" }).hashBytes).toBe(16);
	});

	it("differ by seed, salt and adapter from the first block on", () => {
		const options = [
			{},
			{ seed: "0" },
			{ cacheSalt: "tenant-a" },
			{ lora: { name: "sql", path: "/loras/sql" } },
			{ lora: { name: "sql", path: "/loras/other" } },
		];
		const all = options.flatMap((options) => blockHashes(tokens, options).toHex());
		expect(new Set(all).size).toBe(options.length * 6);
		expect(blockHashes(tokens, { cacheSalt: "" })).toEqual(blockHashes(tokens));
	});

	it("need a seed with xxhash, which vLLM draws anew in each process", () => {
		expect(() => blockHashes(tokens, { algorithm: "xxhash" })).toThrow(
			code("INVALID_ARGUMENT", /PYTHONHASHSEED/),
		);
	});
});

describe("keys that differ from block to block", () => {
	const image = { identifier: "image", offset: 10, length: 20 };
	const data = Uint8Array.from({ length: 100 * 4 }, (_, at) => at);
	const promptEmbeds = { data, bytesPerToken: 4 };

	it("are hashed as vLLM does", () => {
		const keyed = vllm.cases.filter(
			({ mm_features, prompt_embeds, lookahead }) =>
				mm_features.length > 0 || prompt_embeds !== null || lookahead > 0,
		);
		expect(keyed.length).toBeGreaterThan(40);
		for (const item of keyed) {
			const embeds = item.prompt_embeds;
			const bytes = embeds?.dtype === "float32" ? 4 : 2;
			for (const [algorithm, hashes] of Object.entries(item.block_hashes)) {
				const options: BlockHasherOptions = {
					blockSize: item.block_size,
					algorithm: algorithm as BlockAlgorithm,
					seed: item.PYTHONHASHSEED ?? undefined,
					cacheSalt: item.cache_salt ?? undefined,
					lora: item.lora ?? undefined,
					mmFeatures: item.mm_features,
					promptEmbeds: embeds
						? { data: Buffer.from(embeds.raw_hex, "hex"), bytesPerToken: embeds.shape[1] * bytes }
						: undefined,
					numHashLookaheadTokens: item.lookahead,
				};
				const tokens = [...item.token_ids, ...item.append_tokens];
				expect(blockHashes(tokens, options).toHex()).toEqual(hashes);
			}
		}
	});

	it("change the blocks that they reach into, and so those after them", () => {
		const plain = blockHashes(tokens).toHex();
		const firstChanged = (options: BlockHasherOptions) =>
			blockHashes(tokens, options)
				.toHex()
				.findIndex((hash, at) => hash !== plain[at]);
		expect(firstChanged({ mmFeatures: [image] })).toBe(0);
		expect(firstChanged({ mmFeatures: [{ ...image, offset: 16 }] })).toBe(1);
		expect(firstChanged({ mmFeatures: [{ ...image, offset: 96 }] })).toBe(-1);
		// One token ahead, the image of the next block is in sight.
		const near = { ...image, offset: 32 };
		const ahead = { numHashLookaheadTokens: 1 };
		const looking = blockHashes(tokens, ahead).toHex();
		const seen = blockHashes(tokens, { ...ahead, mmFeatures: [near] }).toHex();
		expect(seen.findIndex((hash, at) => hash !== looking[at])).toBe(1);
		expect(firstChanged({ promptEmbeds })).toBe(0);
		expect(blockHashes(tokens, { mmFeatures: [] }).toHex()).toEqual(plain);
	});

	it("look ahead: a block has a hash once the tokens after it are there", () => {
		const hasher = new BlockHasher({ numHashLookaheadTokens: 2 });
		const counts = [1, 16, 1, 15, 1, 0].map(
			(count) => hasher.append(new Uint32Array(count)).length,
		);
		expect(counts).toEqual([0, 0, 1, 0, 1, 0]);
		expect(blockHashes([1, 2, 3], { blockSize: 1, numHashLookaheadTokens: 2 }).length).toBe(1);
	});

	it("are copied: what the caller does to them later changes nothing", () => {
		const features = [{ ...image }];
		const embeds = { data: data.slice(), bytesPerToken: 4 };
		const options = { mmFeatures: features, promptEmbeds: embeds };
		const expected = blockHashes(tokens, options);
		const hasher = new BlockHasher(options);
		embeds.data.fill(0);
		features.length = 0;
		expect(hasher.append(tokens)).toEqual(expected);
	});

	it.each<[string, object]>([
		["mmFeatures must be an array", { mmFeatures: image }],
		["mmFeatures\\[0\\] must be", { mmFeatures: [undefined] }],
		["mmFeatures\\[1\\]\\.identifier must be", { mmFeatures: [image, { offset: 1, length: 1 }] }],
		["identifier has half", { mmFeatures: [{ ...image, identifier: "\ud800" }] }],
		[
			"identifier has at most 4096 bytes",
			{ mmFeatures: [{ ...image, identifier: "x".repeat(4097) }] },
		],
		["offset is 0\\.5", { mmFeatures: [{ ...image, offset: 0.5 }] }],
		["offset is 9007199254740992", { mmFeatures: [{ ...image, offset: 2 ** 53 }] }],
		["length is -1", { mmFeatures: [{ ...image, length: -1 }] }],
		["promptEmbeds must be", { promptEmbeds: null }],
		["promptEmbeds\\.data must be", { promptEmbeds: { data: [1], bytesPerToken: 1 } }],
		["bytesPerToken is 0", { promptEmbeds: { data, bytesPerToken: 0 } }],
		["400 bytes.*rows of 3 bytes", { promptEmbeds: { data, bytesPerToken: 3 } }],
		["numHashLookaheadTokens is -1", { numHashLookaheadTokens: -1 }],
		["numHashLookaheadTokens is 1\\.5", { numHashLookaheadTokens: 1.5 }],
	])("are refused when they cannot be: %s", (message, options) => {
		expect(() => blockHashes(tokens, options as BlockHasherOptions)).toThrow(
			code("INVALID_ARGUMENT", new RegExp(message)),
		);
	});
});

describe("a growing sequence", () => {
	it("gives only the hashes that the new tokens complete", () => {
		for (const [hasher, whole] of [
			[new ChunkHasher({ chunkSize: 8 }), chunkHashes(tokens, { chunkSize: 8 })],
			[new BlockHasher({ blockSize: 8 }), blockHashes(tokens, { blockSize: 8 })],
		] as const) {
			const grown = [0, 7, 8, 9, 41].map((start, part, starts) =>
				hasher.append(tokens.subarray(start, starts[part + 1])),
			);
			expect(grown.map(({ length }) => length)).toEqual([0, 1, 0, 4, 7]);
			expect(grown.flatMap((hashes) => hashes.toHex())).toEqual(whole.toHex());
		}
	});

	it("hashes with every key like a whole one, less those that still look ahead", () => {
		const options: BlockHasherOptions = {
			blockSize: 8,
			cacheSalt: "t",
			lora: { name: "sql", path: "/loras/sql" },
			mmFeatures: [
				{ identifier: "a", offset: 5, length: 30 },
				{ identifier: "b", offset: 35, length: 2 },
			],
			promptEmbeds: { data: new Uint8Array(50 * 4).fill(7), bytesPerToken: 4 },
			numHashLookaheadTokens: 3,
		};
		const hasher = new BlockHasher(options);
		const grown = [0, 10, 11, 12, 60].map((start, part, starts) =>
			hasher.append(tokens.subarray(start, starts[part + 1])),
		);
		expect(grown.map(({ length }) => length)).toEqual([0, 1, 0, 6, 5]);
		expect(grown.flatMap((hashes) => hashes.toHex())).toEqual(blockHashes(tokens, options).toHex());
	});

	it("can go on after a hash that was kept", () => {
		const whole = chunkHashes(tokens, { chunkSize: 10 });
		const rest = chunkHashes(tokens.subarray(30), { chunkSize: 10, parent: whole.at(2) });
		expect(rest.toHex()).toEqual(whole.toHex().slice(3));
		expect(() => chunkHashes(tokens, { parent: new Uint8Array(16) })).toThrow(
			code("INVALID_ARGUMENT", /16 bytes.*32/),
		);
	});

	it("writes where the caller says", () => {
		const into = new Uint8Array(500);
		const hashes = new BlockHasher().append(tokens, into);
		expect(hashes.bytes.buffer).toBe(into.buffer);
		expect(hashes.toHex()).toEqual(blockHashes(tokens).toHex());

		const hasher = new BlockHasher();
		const message = /192 bytes.*191/;
		expect(() => hasher.append(tokens, new Uint8Array(191))).toThrow(
			code("INVALID_ARGUMENT", message),
		);
		const same = new Uint8Array(tokens.buffer);
		expect(() => hasher.append(tokens, same)).toThrow(code("INVALID_ARGUMENT", /share its buffer/));
		expect(hasher.append(tokens)).toEqual(blockHashes(tokens));
	});

	it("is as it was after a refused token", () => {
		const hasher = new ChunkHasher({ chunkSize: 4 });
		hasher.append([1, 2, 3]);
		expect(() => hasher.append([4, 5, 0.5])).toThrow(code("INVALID_TOKEN", /position 2 is 0\.5/));
		expect(() => hasher.append([4, -5])).toThrow(code("INVALID_TOKEN", /position 1 is -5/));
		expect(hasher.append([4])).toEqual(chunkHashes([1, 2, 3, 4], { chunkSize: 4 }));
	});
});

describe("a token that is no integer", () => {
	it.each([
		[0.5, "0.5"],
		[Number.NaN, "NaN"],
		[Number.POSITIVE_INFINITY, "Infinity"],
		[2 ** 53, "9007199254740992"],
		[undefined, "of type undefined"],
		["7", "of type string"],
		[Object.create(null), "of type object"],
	])("is refused by its position: %s", (token, name) => {
		const ids = [0, 1, token] as number[];
		for (const hash of [chunkHashes, blockHashes]) {
			expect(() => hash(ids)).toThrow(code("INVALID_TOKEN", new RegExp(`position 2 is ${name}`)));
		}
	});

	it("is refused in blake3 when it has no 32 bits", () => {
		for (const ids of [
			[0, 2 ** 32],
			[0n, 2n ** 70n],
			[0, -1],
		] as Tokens[]) {
			expect(() => chunkHashes(ids)).toThrow(code("INVALID_TOKEN", /position 1 .*sha256_cbor/));
		}
	});
});

describe("an array without its memory", () => {
	it("is refused, not read as empty", () => {
		const detached = new Uint32Array(16);
		structuredClone(detached, { transfer: [detached.buffer] });
		expect(() => blockHashes(detached)).toThrow(code("INVALID_ARGUMENT", /tokens.*detached/));
		const parent = new Uint8Array(32);
		structuredClone(parent, { transfer: [parent.buffer] });
		expect(() => blockHashes(tokens, { parent })).toThrow(code("INVALID_ARGUMENT", /parent/));
	});

	it("is refused when its buffer shrank", () => {
		const Resizable = ArrayBuffer as unknown as new (
			bytes: number,
			options: { maxByteLength: number },
		) => ArrayBuffer & { resize(bytes: number): void };
		const buffer = new Resizable(64, { maxByteLength: 64 });
		const ids = new Uint32Array(buffer, 32, 8);
		buffer.resize(16);
		expect(() => blockHashes(ids)).toThrow(code("INVALID_ARGUMENT", /resized/));
	});
});

describe("arguments of the wrong kind", () => {
	it.each([
		["tokens", () => chunkHashes(new Float64Array(4) as never)],
		["chunkSize is 0", () => chunkHashes(tokens, { chunkSize: 0 })],
		["chunkSize is 1.5", () => chunkHashes(tokens, { chunkSize: 1.5 })],
		["blockSize is 4294967296", () => blockHashes(tokens, { blockSize: 2 ** 32 })],
		["md5", () => blockHashes(tokens, { algorithm: "md5" as never })],
		["seed must be a string", () => blockHashes(tokens, { seed: 0 as never })],
		["lora must be", () => blockHashes(tokens, { lora: null as never })],
		["lora.path must be", () => blockHashes(tokens, { lora: { name: "a" } as never })],
		["cacheSalt has half", () => blockHashes(tokens, { cacheSalt: "\ud800" })],
	])("are refused by name: %s", (message, call) => {
		expect(call).toThrow(code("INVALID_ARGUMENT", new RegExp(message)));
	});
});

describe("hashes", () => {
	const hashes = new Hashes(Uint8Array.of(1, 2, 3, 4, 5, 6), 2);

	it("are views of one array", () => {
		expect(hashes.length).toBe(3);
		expect(hashes.at(0)).toEqual(Uint8Array.of(1, 2));
		expect(hashes.at(-1)).toEqual(Uint8Array.of(5, 6));
		expect(hashes.at(3)).toBeUndefined();
		expect(hashes.at(0)?.buffer).toBe(hashes.bytes.buffer);
		expect([...hashes].map((hash) => hash[0])).toEqual([1, 3, 5]);
		expect(() => new Hashes(new Uint8Array(5), 2)).toThrow(code("INVALID_ARGUMENT", /5 bytes/));
	});

	it("of larger blocks are those of each group's last block", () => {
		expect(hashes.coarsen(2).toHex()).toEqual(["0304"]);
		expect(hashes.coarsen(1)).toEqual(hashes);
		expect(hashes.coarsen(4).length).toBe(0);
	});
});

describe("keys", () => {
	const fields = {
		modelName: "org/model",
		worldSize: 8,
		rank: 5,
		chunkHash: Uint8Array.of(0xab, 0x01),
	};

	it("of objects have LMCache's text form", () => {
		expect(objectKey(fields)).toBe("org/model@08050805@0@ab01");
		expect(objectKey({ ...fields, group: 10, cacheSalt: "t" })).toBe("org/model@08050805@a@ab01@t");
	});

	it.each([
		["INVALID_SALT", { cacheSalt: "a@b" }],
		["INVALID_SALT", { cacheSalt: "s".repeat(129) }],
		["INVALID_ARGUMENT", { modelName: "a@b" }],
		["INVALID_ARGUMENT", { worldSize: 256 }],
		["INVALID_ARGUMENT", { rank: 8 }],
		["INVALID_ARGUMENT", { group: -1 }],
	])("that would be ambiguous are refused: %s %o", (expected, change) => {
		expect(() => objectKey({ ...fields, ...change })).toThrow(code(expected, /./));
	});

	it("of blocks carry their group", () => {
		const hash = Uint8Array.from({ length: 32 }, (_, at) => at);
		const packed = packGroupId(hash, 258);
		expect([...packed.subarray(32)]).toEqual([0, 0, 1, 2]);
		expect(unpackGroupId(packed)).toEqual({ hash, group: 258 });
		expect(eventHash(hash)).toBe(0x18191a1b1c1d1e1fn);
	});
});
