import { describe, expect, it } from "vitest";
import { SERVE } from "../ts/cli/settings.js";
import { nearest, otherName } from "../ts/nearest.js";

describe("nearest", () => {
	it.each([
		["prot", "port"],
		["chunksize", "chunk-size"],
		["dsik", "disk"],
		["http_port", "http-port"],
	])("%s is taken for %s", (wrong, right) => {
		expect(nearest(wrong, Object.keys(SERVE))).toBe(right);
	});

	it.each([
		["mem", "memory"], // "ipc" has as few other letters
		["chunk", "chunk-size"],
		["http", "http-port"],
	])("%s is the beginning of %s", (short, whole) => {
		expect(nearest(short, Object.keys(SERVE))).toBe(whole);
	});

	it.each(["url", "x", "", "database"])("%j is none of them, and nobody guesses", (foreign) => {
		expect(nearest(foreign, Object.keys(SERVE))).toBeUndefined();
		expect(otherName(foreign, ["a-name", "other"], "--")).toBe("there are --a-name, --other");
	});
});
