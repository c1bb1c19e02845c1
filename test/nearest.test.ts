import { describe, expect, it } from "vitest";
import { SERVE } from "../ts/cli/settings.js";
import { nearest } from "../ts/nearest.js";

describe("nearest", () => {
	it.each([
		["prot", "port"],
		["chunksize", "chunk-size"],
		["dsik", "disk"],
		["http_port", "http-port"],
	])("%s is taken for %s", (wrong, right) => {
		expect(nearest(wrong, Object.keys(SERVE))).toBe(right);
	});
});
