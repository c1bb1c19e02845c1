import { types } from "node:util";
import { KvferryError } from "./errors.js";
import { distance, otherName } from "./nearest.js";

/** An `INVALID_ARGUMENT`. */
export function invalid(message: string): KvferryError {
	return new KvferryError("INVALID_ARGUMENT", message);
}

/** Checks for an integer from `min` to `max`. */
export function checkInteger(name: string, value: unknown, min: number, max: number): void {
	if (!Number.isInteger(value) || (value as number) < min || (value as number) > max) {
		throw invalid(`${name} is ${named(value)}: it must be an integer from ${min} to ${max}`);
	}
}

/** A value as a message can hold it. */
export function named(value: unknown): string {
	return typeof value === "number" ? String(value) : `of type ${typeof value}`;
}

/** Checks for true or false. */
export function checkBoolean(name: string, value: unknown): asserts value is boolean {
	if (typeof value !== "boolean") {
		throw invalid(`${name} is ${shown(value)}: it must be true or false`);
	}
}

/** Checks for a function. */
export function checkFunction(name: string, value: unknown): void {
	if (typeof value !== "function") {
		throw invalid(`${name} is ${shown(value)}: it must be a function`);
	}
}

/** Where warnings go: to `onWarning`, or to the process. */
export function warningsTo(
	onWarning: ((message: string) => void) | undefined,
): (message: string) => void {
	if (onWarning === undefined) {
		return (message) => process.emitWarning(message, "KvferryWarning");
	}
	checkFunction("onWarning", onWarning);
	return onWarning;
}

/** Checks for an object. */
export function checkObject(name: string, value: unknown): void {
	if (typeof value !== "object" || value === null || Array.isArray(value)) {
		throw invalid(`${name} must be an object`);
	}
}

/**
 * Checks for an object that has such a member: of an engine's class, or of ours from whichever build.
 *
 * @param remedy What to give.
 */
export function checkHandle(name: string, value: unknown, member: string, remedy: string): void {
	if (typeof value === "object" && value !== null && member in value) {
		return;
	}
	const isPromise = typeof (value as { then?: unknown } | null | undefined)?.then === "function";
	throw invalid(`${name} is ${isPromise ? "a promise, await it" : shown(value)}: ${remedy}`);
}

/** Checks for a `Client` or a `Server`, by what is asked of it. */
export function checkVia(via: unknown, member: "openPrefixCache" | "openWorker"): void {
	const remedy = "give await Client.connect({ url }), or await Server.start({ listen: false })";
	checkHandle("via", via, member, remedy);
}

/** A value as a message can hold it, texts too; a password in an address is nobody's to read. */
export function shown(value: unknown): string {
	if (value === undefined || value === null) {
		return value === null ? "null" : "missing";
	}
	return typeof value === "string"
		? JSON.stringify(value.replace(/\/\/.*@/s, "//…@").slice(0, 100))
		: named(value);
}

/** What an object has for a salt under another name than `cacheSalt`, or misspelt: left alone, all tenants would share it. */
export function misnamedSalt(of: object): string | undefined {
	const means = ([name, value]: [string, unknown]) => {
		if (name === "cacheSalt" || value === undefined || value === null || value === "") {
			return false;
		}
		if (typeof value === "function") {
			return false;
		}
		const plain = name.replaceAll(/[-_]/g, "").toLowerCase();
		return plain === "salt" || plain === SALT || (typeof value === "string" && isNear(plain));
	};
	// Of an instance's class, too, by the names that it has elsewhere.
	const inherited = ELSEWHERE.map((name): [string, unknown] => [name, Reflect.get(of, name)]);
	return [...Object.entries(of), ...inherited].find(means)?.[0];
}

const SALT = "cachesalt";
const ELSEWHERE = ["cache_salt", "salt"];

/** One letter more, less or another, or two that changed places: an engine has fields of its own that are further away. */
function isNear(name: string): boolean {
	const sorted = (text: string) => [...text].sort().join("");
	return (
		Math.abs(name.length - SALT.length) <= 1 &&
		(distance(name, SALT) === 1 || sorted(name) === sorted(SALT))
	);
}

/** Checks for an object of options that has no others than these: one that is misspelt would be left alone. */
export function checkOptions(of: string, options: unknown, known: Record<string, true>): void {
	checkObject(`the options of ${of}`, options);
	for (const [name, value] of Object.entries(options as object)) {
		if (value !== undefined && !Object.hasOwn(known, name)) {
			const other = otherName(name, Object.keys(known));
			throw invalid(`${of} has no option ${JSON.stringify(name)}: ${other}`);
		}
	}
}

/** Checks for an object in which none of these names is misspelt: others may be an engine's own, and are let alone. */
export function checkSpelled(of: string, object: unknown, known: Record<string, true>): void {
	checkObject(`the argument of ${of}`, object);
	const plain = (name: string) => name.replaceAll(/[-_]/g, "").toLowerCase();
	for (const [name, value] of Object.entries(object as object)) {
		if (value === undefined || Object.hasOwn(known, name)) {
			continue;
		}
		const meant = Object.keys(known).find(
			(other) => plain(name) === plain(other) || (other.length > 6 && distance(name, other) <= 2),
		);
		if (meant !== undefined) {
			throw invalid(`${of} knows no ${JSON.stringify(name)}: did you mean ${meant}?`);
		}
	}
}

/** Checks for a string without lone surrogates, which have no UTF-8. */
export function checkText(name: string, text: unknown): asserts text is string {
	if (typeof text !== "string") {
		throw invalid(`${name} must be a string`);
	}
	if (/\p{Surrogate}/u.test(text)) {
		throw invalid(`${name} has half of a surrogate pair, which UTF-8 cannot say: correct the text`);
	}
}

/** Checks for a text that says something. */
export function checkGiven(name: string, text: unknown): asserts text is string {
	checkText(name, text);
	if (text === "") {
		throw invalid(
			`${name} is empty: give one, or leave it out; is a variable missing that it is read from?`,
		);
	}
}

/** Checks for bytes that still have their memory. */
export function checkBytes(name: string, bytes: unknown): asserts bytes is Uint8Array {
	if (!types.isUint8Array(bytes)) {
		throw invalid(`${name} must be a Uint8Array`);
	}
	checkAttached(name, bytes);
}

/** Checks for what can be iterated, texts excepted. */
export function checkIterable(name: string, values: unknown): void {
	if (typeof values !== "object" || values === null || !(Symbol.iterator in values)) {
		throw invalid(`${name} must be an array, a set or another iterable`);
	}
}

/** Checks for token ids in an array, without looking at each. */
export function checkTokenIds(name: string, tokenIds: unknown): void {
	if (types.isUint32Array(tokenIds)) {
		checkAttached(name, tokenIds);
	} else if (!Array.isArray(tokenIds)) {
		throw invalid(`${name} must be an array or a Uint32Array`);
	}
}

/** Checks for the token ids of a prompt. */
export function checkTokens(tokens: unknown): asserts tokens is Uint32Array {
	if (!types.isUint32Array(tokens)) {
		throw invalid("tokens must be a Uint32Array: Uint32Array.from(ids)");
	}
	checkAttached("tokens", tokens);
}

/** The salt to use: absent, null and "" are the same, where no default was put in. Characters and length are checked natively. */
export function checkSalt(salt: unknown): string {
	if (salt === undefined || salt === null) {
		return "";
	}
	if (typeof salt !== "string" || /\p{Surrogate}/u.test(salt)) {
		throw new KvferryError(
			"INVALID_SALT",
			"cacheSalt must be a string without halves of surrogate pairs, or null for none",
		);
	}
	return salt;
}

/** A detached array, or one that its resized buffer no longer covers, reads as empty: refuse it. */
export function checkAttached(name: string, array: Uint8Array | Uint32Array): void {
	if (array.length > 0) {
		return;
	}
	try {
		array.keys();
	} catch (error) {
		throw new KvferryError(
			"INVALID_ARGUMENT",
			`the buffer of ${name} was detached (transferred) or resized: pass an array that still has its memory`,
			{ cause: error },
		);
	}
}
