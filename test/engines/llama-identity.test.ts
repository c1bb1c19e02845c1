import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { checkModel, type IdentityOptions, identityOf } from "../../ts/engines/llama-identity.js";
import type { EngineContext, EngineModel } from "../../ts/engines/node-llama-cpp.js";

let directory: string;

beforeEach(() => {
	directory = mkdtempSync(join(tmpdir(), "kvferry-test-"));
	vi.stubEnv("XDG_CACHE_HOME", join(directory, "cache"));
});

afterEach(() => {
	vi.unstubAllEnvs();
	rmSync(directory, { recursive: true });
});

const SHA256 = "ab".repeat(32);

function model(insights: Partial<EngineModel["fileInsights"]> = {}): EngineModel {
	return {
		llama: {
			llamaCppRelease: { repo: "ggml-org/llama.cpp", release: "b1" },
			buildType: "prebuilt",
			gpu: false,
		},
		filename: "model.gguf",
		architecture: "llama",
		tokenizer: () => [],
		tokens: { bos: 1 },
		fileInfo: {
			metadata: { general: {}, llama: { rope: { freq_base: 10000 }, block_count: 2 } },
			splicedParts: 1,
		},
		fileInsights: {
			isRecurrent: false,
			isHybrid: false,
			hasEncoder: false,
			swaSize: undefined,
			...insights,
		},
	};
}

function context(of: EngineModel, more: object = {}): EngineContext {
	return {
		model: of,
		flashAttention: "auto",
		sequencesLeft: 1,
		getSequence: () => {
			throw new Error("no sequence is needed");
		},
		_loraAdapters: new Set(),
		...more,
	} as EngineContext;
}

function identity(of: EngineContext, options: IdentityOptions = {}): Promise<string> {
	return identityOf(of, { modelSha256: SHA256, ...options });
}

describe("models that cannot be cached", () => {
	it.each([
		[{ swaSize: 4096 }, /sliding-window/],
		[{ isHybrid: true }, /hybrid/],
		[{ isRecurrent: true }, /recurrent/],
		[{ hasEncoder: true }, /encoder/],
	])("%j are refused by name", (insights, reason) => {
		expect(() => checkModel(model(insights))).toThrow(reason);
		expect(() => checkModel(model(insights))).toThrow(
			expect.objectContaining({ code: "UNSUPPORTED_MODEL" }),
		);
	});

	it("are not those with plain attention", () => {
		expect(() => checkModel(model())).not.toThrow();
		expect(() => checkModel(model({ swaSize: 0 }))).not.toThrow();
	});
});

describe("the identity", () => {
	it("differs with everything that the state depends on", async () => {
		const plain = model();
		const { llama, fileInfo } = plain;
		const newer = { ...llama, llamaCppRelease: { repo: "ggml-org/llama.cpp", release: "b2" } };
		const stretched = {
			metadata: { llama: { rope: { freq_base: 20000 }, block_count: 2 } },
			splicedParts: 1,
		};
		const identities = await Promise.all([
			identity(context(plain)),
			identity(context(plain), { modelSha256: "cd".repeat(32) }),
			identity(context(plain), { lora: "adapter × 0.5" }),
			identity(context(plain, { flashAttention: false })),
			identity(context({ ...plain, llama: newer })),
			identity(context({ ...plain, llama: { ...llama, gpu: "cuda" } })),
			identity(context({ ...plain, llama: { ...llama, buildType: "localBuild" } })),
			identity(context({ ...plain, fileInfo: stretched })),
		]);
		expect(new Set(identities).size).toBe(identities.length);
		const reordered = {
			metadata: { llama: { block_count: 2, rope: { freq_base: 10000 } }, general: {} },
			splicedParts: fileInfo.splicedParts,
		};
		expect(await identity(context({ ...plain, fileInfo: reordered }))).toBe(identities[0]);
		expect(await identity(context(plain), { lora: "" })).toBe(identities[0]);
		expect(await identity(context(plain), { modelSha256: SHA256.toUpperCase() })).toBe(
			identities[0],
		);
	});

	it("asks for what the engine does not tell", async () => {
		const unknown = (lookedFor: RegExp) => ({
			code: "IDENTITY_UNKNOWN",
			message: expect.stringMatching(lookedFor),
		});
		await expect(
			identity(context(model(), { _loraAdapters: new Set([{}]) })),
		).rejects.toMatchObject(unknown(/`lora`/));
		const adapted = context(model(), { _loraAdapters: new Set([{}]) });
		await expect(identity(adapted, { lora: "" })).rejects.toMatchObject(unknown(/`lora`/));
		await expect(identity(adapted, { lora: null as never })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(/^lora/),
		});
		await expect(identity(context(model(), { _loraAdapters: undefined }))).rejects.toMatchObject(
			unknown(/`lora`/),
		);
		await expect(identityOf(context(model()), {})).rejects.toMatchObject(unknown(/`modelPath`/));
		const split = { metadata: {}, splicedParts: 3 };
		await expect(
			identityOf(context({ ...model(), fileInfo: split }), { modelPath: "/models/model.gguf" }),
		).rejects.toMatchObject(unknown(/3 files.*`modelSha256`/));
	});

	it("stays that of the file that a model was loaded from", async () => {
		const loaded = model();
		const modelPath = join(directory, "model.gguf");
		writeFileSync(modelPath, "weights");
		const first = await identityOf(context(loaded), { modelPath });
		writeFileSync(modelPath, "other weights");
		expect(await identityOf(context(loaded), { modelPath })).toBe(first);
		expect(await identityOf(context(model()), { modelPath })).not.toBe(first);
	});

	it("refuses a hash and a file that cannot be the model's", async () => {
		const refused = { code: "INVALID_ARGUMENT" };
		await expect(identity(context(model()), { modelSha256: "ab" })).rejects.toMatchObject(refused);
		await expect(
			identityOf(context(model()), { modelPath: "/models/other.gguf" }),
		).rejects.toMatchObject(refused);
		await expect(
			identityOf(context(model()), { modelPath: join(directory, "model.gguf") }),
		).rejects.toMatchObject({ code: "SYSTEM" });
	});
});
