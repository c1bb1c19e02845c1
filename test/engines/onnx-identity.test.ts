import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
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
