import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { ErrorCodes, fromNative, KvferryError, wrap } from "../ts/errors.js";

describe("error codes", () => {
	it("are the same set as the addon's", () => {
		const rust = readFileSync(
			new URL("../crates/kvferry-core/src/error.rs", import.meta.url),
			"utf8",
		);
		const codes = [...rust.matchAll(/Self::\w+ => "([A-Z_]+)"/g)].map((match) => match[1]);
		expect(codes.sort()).toEqual(Object.values(ErrorCodes).sort());
	});

	it("say whether a retry may help", () => {
		expect(new KvferryError("TIMEOUT", "no answer in 5 ms").retryable).toBe(true);
		expect(new KvferryError("UNREACHABLE", "nobody listens").retryable).toBe(true);
		expect(new KvferryError("INVALID_ARGUMENT", "chunk size 0").retryable).toBe(false);
	});
});

describe("KvferryError", () => {
	it("is an Error with a name, a code and a cause", () => {
		const cause = new Error("why");
		const error = new KvferryError("CLOSED", "the client is closed", { cause });
		expect(error).toBeInstanceOf(Error);
		expect(error).toMatchObject({ name: "KvferryError", code: "CLOSED", cause });
		expect(String(error)).toBe("KvferryError: the client is closed");
	});

	it("is recognised across the two builds of the package", async () => {
		const other = await import("../ts/errors.js?build=cjs" as "../ts/errors.js");
		expect(other.KvferryError).not.toBe(KvferryError);
		expect(new other.KvferryError("TIMEOUT", "late")).toBeInstanceOf(KvferryError);
		expect(new Error("TIMEOUT: late")).not.toBeInstanceOf(KvferryError);
		expect(null).not.toBeInstanceOf(KvferryError);
	});
});

describe("what the addon throws", () => {
	const native = (message: string, code = "GenericFailure") =>
		Object.assign(new Error(message), { code });

	it("keeps its code and its message", () => {
		const thrown = native("INVALID_TOKEN: position 3: 1.5 is no integer");
		expect(fromNative(thrown)).toMatchObject({
			code: "INVALID_TOKEN",
			message: "position 3: 1.5 is no integer",
			cause: thrown,
		});
	});

	it("is a refused argument where napi could not convert it", () => {
		expect(fromNative(native("Failed to convert", "StringExpected")).code).toBe("INVALID_ARGUMENT");
		expect(fromNative(native("Value is not a Uint32Array", "InvalidArg")).code).toBe(
			"INVALID_ARGUMENT",
		);
	});

	it("is a bug where it has no code", () => {
		expect(fromNative(native("index out of bounds")).code).toBe("INTERNAL");
		expect(fromNative(native("toString: no code of ours")).code).toBe("INTERNAL");
		expect(fromNative("a string").code).toBe("INTERNAL");
	});

	it("passes through wrap", () => {
		const fail = () => {
			throw native("CLOSED: the store is closed");
		};
		expect(wrap(() => 1)).toBe(1);
		expect(() => wrap(fail)).toThrow(KvferryError);
		const own = new KvferryError("ABORTED", "by the caller");
		const rethrow = () => {
			throw own;
		};
		expect(() => wrap(rethrow)).toThrow(own);
	});
});
