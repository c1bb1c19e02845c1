import { describe, expect, it } from "vitest";
import { misnamedSalt } from "../ts/arguments.js";
import { createConnector } from "../ts/config.js";
import { checkSpelling } from "../ts/engines/calls.js";
import { blockHashes, chunkHashes, objectKey } from "../ts/hash.js";
import {
	handleFailedRecving,
	handleInvalidBlocks,
	updateWaitingForRemoteKv,
} from "../ts/recovery.js";
import { TrackerTable } from "../ts/tracker.js";

describe("a name that means cacheSalt", () => {
	it.each(["cache_salt", "cachesalt", "CACHE-SALT", "cacheSlat", "cacheSal", "cachSalt", "salt"])(
		"is told from the engine's own: %s",
		(name) => {
			expect(misnamedSalt({ cacheSalt: "a", [name]: "b" })).toBe(name);
			expect(() => checkSpelling("prompt", { [name]: "a" })).toThrow(
				`prompt has no option "${name}": did you mean cacheSalt?`,
			);
		},
	);

	it.each([
		"cacheSalt",
		"cache",
		"use_cache",
		"past_key_values",
		"temperature",
		"signal",
		"cacheSize",
	])("is none of these: %s", (name) => {
		expect(misnamedSalt({ [name]: "a" })).toBeUndefined();
		expect(() => checkSpelling("prompt", { [name]: "a" })).not.toThrow();
	});

	it("has a salt: an engine's own fields, and no salt at all, are let alone", () => {
		for (const of of [
			{ cachedAt: "2026-11-27" },
			{ cache_slot: 3 },
			{ cache_salt: null },
			{ salt: "" },
		]) {
			expect(misnamedSalt(of)).toBeUndefined();
		}
		expect(misnamedSalt({ cache_salt: undefined, cacheSalt: undefined })).toBeUndefined();
		expect(misnamedSalt({ cache_salt: 42 })).toBe("cache_salt");
	});
});

describe("options", () => {
	const tokens = Uint32Array.from({ length: 512 }, (_, at) => at);
	const table = new TrackerTable();
	const refused: [of: string, misspelt: string, meant: string, call: (object: never) => unknown][] =
		[
			["BlockHasher", "cache_salt", "cacheSalt", (options) => blockHashes(tokens, options)],
			["ChunkHasher", "chunksize", "chunkSize", (options) => chunkHashes(tokens, options)],
			["objectKey", "cache_salt", "cacheSalt", objectKey],
			["TrackerTable.add", "cache_salt", "cacheSalt", (request) => table.add(request)],
			["handleInvalidBlocks", "blocksize", "blockSize", handleInvalidBlocks],
			["handleFailedRecving", "policy", "", handleFailedRecving],
			["updateWaitingForRemoteKv", "failedReceiving", "failedRecving", updateWaitingForRemoteKv],
		];

	it.each(refused)("of %s are refused when misspelt, or none", (of, misspelt, meant, call) => {
		expect(() => call({ [misspelt]: 1 } as never)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(
					`${of} has no option "${misspelt}": ${meant === "" ? "there are " : `did you mean ${meant}?`}`,
				),
			}),
		);
		expect(() => call(null as never)).toThrow(
			expect.objectContaining({ message: `the options of ${of} must be an object` }),
		);
	});

	it("that nobody has resolved make no connector", async () => {
		await expect(
			createConnector({ kvOffloadingSize: 8 } as never, { modelName: "m" }),
		).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(/^offloading .* resolveOffloading returned/),
		});
	});
});
