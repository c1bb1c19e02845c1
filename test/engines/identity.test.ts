import { createHash } from "node:crypto";
import {
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	statSync,
	utimesSync,
	writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { fileSha256 } from "../../ts/engines/identity.js";

const SHA256 = "ab".repeat(32);

let directory: string;

beforeEach(() => {
	directory = mkdtempSync(join(tmpdir(), "kvferry-test-"));
	vi.stubEnv("XDG_CACHE_HOME", join(directory, "cache"));
});

afterEach(() => {
	vi.unstubAllEnvs();
	rmSync(directory, { recursive: true });
});

describe("the hash of a model's file", () => {
	it("is computed once, until the file changes", async () => {
		const file = join(directory, "model.gguf");
		writeFileSync(file, "weights");
		const sha256 = createHash("sha256").update("weights").digest("hex");
		expect(await fileSha256(file)).toBe(sha256);

		const memory = join(directory, "cache", "kvferry");
		const [name = ""] = readdirSync(memory);
		const remembered = JSON.parse(readFileSync(join(memory, name), "utf8"));
		writeFileSync(join(memory, name), JSON.stringify({ ...remembered, sha256: SHA256 }));
		expect(await fileSha256(file)).toBe(SHA256); // from memory

		utimesSync(file, 1, 1);
		expect(await fileSha256(file)).toBe(sha256);
		writeFileSync(join(memory, name), "{");
		expect(await fileSha256(file)).toBe(sha256);
	});

	it("is another one's where the file was replaced and its times were set back, as tar does", async () => {
		const file = join(directory, "model.gguf");
		const unpack = (weights: string) => {
			writeFileSync(file, weights);
			utimesSync(file, 1, 1);
			return statSync(file, { bigint: true });
		};
		const first = unpack("weights of v1");
		const sha256 = await fileSha256(file);
		let second = unpack("weights of v2");
		while (second.ctimeNs === first.ctimeNs) {
			second = unpack("weights of v2"); // the clock of a file system goes in steps
		}
		expect([second.ino, second.size, second.mtimeNs]).toEqual([
			...[first.ino, first.size, first.mtimeNs],
		]);
		expect(await fileSha256(file)).not.toBe(sha256);
	});

	it("is computed each time where nothing can be remembered", async () => {
		const file = join(directory, "model.gguf");
		writeFileSync(file, "weights");
		vi.stubEnv("XDG_CACHE_HOME", file); // no directory
		const sha256 = createHash("sha256").update("weights").digest("hex");
		expect(await fileSha256(file)).toBe(sha256);
		expect(await fileSha256(file)).toBe(sha256);
	});
});
