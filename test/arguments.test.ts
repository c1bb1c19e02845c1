import { describe, expect, it } from "vitest";
import { misnamedSalt } from "../ts/arguments.js";
import { checkSpelling } from "../ts/engines/calls.js";

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
