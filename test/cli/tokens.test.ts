import { describe, expect, it } from "vitest";
import { parseTokens, readTokens } from "../../ts/cli/tokens.js";

describe("a file of token ids", () => {
	it.each([
		["[1, 2, 4294967295]", [1, 2, 4294967295]],
		[" [\n]\n", []],
		["1 2\n3\t4\r\n", [1, 2, 3, 4]],
		["", []],
	])("reads %j", (text, ids) => {
		expect([...parseTokens(text, "f")]).toEqual(ids);
	});

	it.each([
		["[1, -2]", "1 is -2"],
		["[1.5]", "0 is 1.5"],
		['["1"]', "0 is of type string"],
		["[1, [2]]", "1 is of type object"],
		["1 2 x", '2 is "x"'],
		["1 4294967296", '1 is "4294967296"'],
		["0x10", '0 is "0x10"'],
		["1,2", '0 is "1,2"'],
		['{"a":1}', '0 is "{\\"a\\":1}"'],
	])("names the token that is none: %j", (text, wrong) => {
		expect(() => parseTokens(text, "f")).toThrow(
			expect.objectContaining({
				code: "INVALID_TOKEN",
				message: expect.stringContaining(`--tokens f: token ${wrong}, no integer`),
			}),
		);
	});

	it("names the file that cannot be read, or is cut off", async () => {
		await expect(readTokens("/no/such/file")).rejects.toMatchObject({
			code: "SYSTEM",
			message: expect.stringContaining("/no/such/file"),
		});
		expect(() => parseTokens("[1, 2", "f")).toThrow(
			expect.objectContaining({ code: "INVALID_ARGUMENT" }),
		);
	});
});
