import { describe, expect, it } from "vitest";
import { meansSalt } from "../ts/arguments.js";
import { checkSpelling } from "../ts/engines/calls.js";

describe("a name that means cacheSalt", () => {
	it.each(["cache_salt", "cachesalt", "CACHE-SALT", "cacheSlat", "cacheSal", "cachSalt", "salt"])(
		"is told from the engine's own: %s",
		(name) => {
			expect(meansSalt(name)).toBe(true);
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
		expect(meansSalt(name)).toBe(false);
		expect(() => checkSpelling("prompt", { [name]: "a" })).not.toThrow();
	});
});
