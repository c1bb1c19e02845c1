import { createHash } from "node:crypto";
import { appendFileSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { identityOf, type OnnxIdentityOptions } from "../../ts/engines/onnx-identity.js";
import { layoutOf } from "../../ts/engines/onnx-layout.js";
import { sessionOf } from "./onnx-sessions.js";

const LAYOUT = { kvHeads: 4, headSize: 16, dtype: "float32" } as const;
const session = sessionOf(2, LAYOUT);

let directory: string;

beforeEach(() => {
	directory = mkdtempSync(join(tmpdir(), "kvferry-test-"));
	vi.stubEnv("XDG_CACHE_HOME", join(directory, "cache"));
});

afterEach(() => {
	vi.unstubAllEnvs();
	rmSync(directory, { recursive: true });
});

function identity(options: OnnxIdentityOptions, of: object = session): Promise<string> {
	const known = of as typeof session;
	return identityOf(known, layoutOf(known, undefined), options);
}

describe("the identity", () => {
	it("differs with everything that the KV depends on", async () => {
		const modelPath = join(directory, "model.onnx");
		writeFileSync(modelPath, "weights");
		const identities = [
			await identity({ modelId: "m" }),
			await identity({ modelId: "n" }),
			await identity({ modelPath }),
			await identity({ modelId: "m", engine: "cuda" }),
			await identity({ modelId: "m" }, sessionOf(3, LAYOUT)),
			await identity({ modelId: "m" }, sessionOf(2, { ...LAYOUT, headSize: 32 })),
			await identity({ modelId: "m" }, sessionOf(2, { ...LAYOUT, kvHeads: 8 })),
			await identity({ modelId: "m" }, sessionOf(2, { ...LAYOUT, dtype: "float16" })),
			// What transformers.js notes: the same name has files of several precisions.
			await identity({ modelId: "m" }, { ...session, config: { dtype: "fp32", device: "cpu" } }),
			await identity({ modelId: "m" }, { ...session, config: { dtype: "q4", device: "cpu" } }),
			await identity({ modelId: "m" }, { ...session, config: { dtype: "q4", device: "webgpu" } }),
		];
		writeFileSync(modelPath, "other weights");
		identities.push(await identity({ modelPath }));
		expect(new Set(identities).size).toBe(identities.length);
		expect(await identity({ modelId: "m", engine: "cpu" })).toBe(identities[0]);
	});

	it("asks for the model, and names the file that is missing", async () => {
		await expect(identity({})).rejects.toMatchObject({
			code: "IDENTITY_UNKNOWN",
			message: expect.stringMatching(/`modelPath`.*`modelId`/),
		});
		await expect(identity({ modelId: "" })).rejects.toMatchObject({ code: "IDENTITY_UNKNOWN" });
		await expect(identity({ modelPath: join(directory, "none.onnx") })).rejects.toMatchObject({
			code: "SYSTEM",
			message: expect.stringContaining("none.onnx"),
		});
	});
});

/** What a tensor of a graph has instead of its data. */
function entry(name: string, length = varint(Buffer.byteLength(name))): Buffer {
	return Buffer.concat([Buffer.from("\n\blocation\x12"), length, Buffer.from(name)]);
}

function varint(value: number): Buffer {
	const low = value % 128;
	return value < 128
		? Buffer.from([low])
		: Buffer.concat([Buffer.from([low + 128]), varint(Math.floor(value / 128))]);
}

/** A name of the file `weights` with a given number of bytes. */
function weightsBy(bytes: number): string {
	const prefix = "./".repeat(Math.floor((bytes - "weights".length) / 2));
	return prefix + "weights".padStart(bytes - prefix.length, "/");
}

describe("files of external data", () => {
	let modelPath: string;

	beforeEach(() => {
		modelPath = join(directory, "model.onnx");
	});

	/** Writes a file beside the model, and gives its hash. */
	function weights(name: string, content: string): string {
		writeFileSync(join(directory, name), content);
		return createHash("sha256").update(content).digest("hex");
	}

	async function hashes(): Promise<string[]> {
		return JSON.parse(await identity({ modelPath })).model.external;
	}

	it("belong to the identity, each once, in the order of their use", async () => {
		const [b, a] = [weights("b", "1"), weights("a", "2")];
		writeFileSync(modelPath, Buffer.concat([entry("b"), entry("a"), entry("b")]));
		expect(await hashes()).toEqual([b, a]);
		writeFileSync(modelPath, Buffer.concat([entry("a"), entry("none")]));
		await expect(hashes()).rejects.toMatchObject({
			code: "SYSTEM",
			message: expect.stringContaining(join(directory, "none")),
		});
	});

	it("are told apart behind a graph of more than 64 MiB", async () => {
		writeFileSync(modelPath, "graph");
		truncateSync(modelPath, 2 ** 26); // takes no space
		appendFileSync(modelPath, entry("weights"));
		weights("weights", "some");
		const before = await identity({ modelPath });
		weights("weights", "others");
		expect(await identity({ modelPath })).not.toBe(before);
	});

	it("can have long names", async () => {
		const name = "w".repeat(200);
		const sha256 = weights(name, "some");
		writeFileSync(modelPath, Buffer.concat([entry(name), Buffer.from("more of the graph")]));
		expect(await hashes()).toEqual([sha256]);
		weights("weights", "some");
		for (const bytes of [127, 128, 4096]) {
			writeFileSync(modelPath, entry(weightsBy(bytes)));
			expect(await hashes(), `${bytes} bytes`).toEqual([sha256]);
		}
	});

	it("are found across the boundaries of reads", async () => {
		const sha256 = weights("weights", "some");
		for (const name of ["weights", weightsBy(200), weightsBy(4096)]) {
			const found = entry(name);
			for (const within of [0, 1, 10, 11, 12, 13, 17, found.length - 1, found.length]) {
				for (const after of [0, 2 ** 20]) {
					const graph = [Buffer.alloc(2 ** 20 - within), found, Buffer.alloc(after)];
					writeFileSync(modelPath, Buffer.concat(graph));
					expect(await hashes(), `${within} of ${found.length} bytes`).toEqual([sha256]);
				}
			}
		}
	});

	it.each([
		["longer than a path", entry(weightsBy(4097))],
		["without an end", entry("weights", varint(8))],
		["without a length", entry("", Buffer.alloc(0))],
		["with half a length", entry("", Buffer.from([0x80]))],
		["with a length of 2 ** 32 + 7", entry("weights", varint(2 ** 32 + 7))],
		["with a length without an end", entry("weights", Buffer.alloc(11, 0x80))],
	])("are not left out when they have a name %s", async (_, bad) => {
		weights("weights", "some");
		writeFileSync(modelPath, bad);
		await expect(identity({ modelPath })).rejects.toMatchObject({
			code: "IDENTITY_UNKNOWN",
			message: expect.stringMatching(/model\.onnx.*4096 bytes.*`modelId`/),
		});
	});
});
