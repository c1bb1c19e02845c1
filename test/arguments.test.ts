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

	it.each<[of: string, misspelt: string, meant: string, call: (object: never) => unknown]>([
		["BlockHasher", "cache_salt", "cacheSalt", (options) => blockHashes(tokens, options)],
		["ChunkHasher", "chunksize", "chunkSize", (options) => chunkHashes(tokens, options)],
		["objectKey", "cache_salt", "cacheSalt", objectKey],
	])("of %s are refused when misspelt, or none", (of, misspelt, meant, call) => {
		expect(() => call({ [misspelt]: 1 } as never)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: `${of} has no option "${misspelt}": did you mean ${meant}?`,
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

describe("what an engine has of its own", () => {
	const table = new TrackerTable();

	it.each<[of: string, misspelt: string, meant: string, call: (object: never) => unknown]>([
		["TrackerTable.add", "num_tokens", "numTokens", (request) => table.add(request)],
		["TrackerTable.add", "cacheSlat", "cacheSalt", (request) => table.add(request)],
		["handleInvalidBlocks", "blocksize", "blockSize", handleInvalidBlocks],
		["handleFailedRecving", "kvLoadFailurePolcy", "kvLoadFailurePolicy", handleFailedRecving],
		["updateWaitingForRemoteKv", "failedRecieving", "failedRecving", updateWaitingForRemoteKv],
	])("may not be misspelt in %s", (of, misspelt, meant, call) => {
		expect(() => call({ [misspelt]: "x" } as never)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: `${of} knows no "${misspelt}": did you mean ${meant}?`,
			}),
		);
		expect(() => call(undefined as never)).toThrow(
			expect.objectContaining({ message: `the argument of ${of} must be an object` }),
		);
	});

	it("is let alone where it is not ours", () => {
		const own = { status: "RUNNING", priority: 1, allTokenIds: [1, 2], numPromptTokens: 2 };
		expect(table.add({ requestId: "own", numTokens: 2, ...own })).toMatchObject({ cacheSalt: "" });
		const load = { requestId: "own", numComputedTokens: 2, numTokens: 3, ...own };
		expect(updateWaitingForRemoteKv(load).numComputedTokens).toBe(2);
		const step = { running: [], numScheduledTokens: {}, invalidBlockIds: [] };
		expect(handleInvalidBlocks({ ...step, ...{ scheduledNewReqs: [] } }).affectedBlockIds).toEqual(
			[],
		);
		expect(() => table.add({ requestId: "salted", numTokens: 2, ...{ salt: "a" } })).toThrow(
			/has a salt, and no cacheSalt/,
		);
	});
});
