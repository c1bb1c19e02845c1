import { isIP, isIPv4, isIPv6 } from "node:net";
import { invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import type { EvictionPolicy } from "../server.js";
import type { Found } from "./settings.js";

/** A value as it was written, and how an error names it with its place: `--port 1`. */
export interface Given {
	readonly text: string;
	readonly says: string;
}

const POLICIES: readonly EvictionPolicy[] = ["default", "lru", "arc", "s3fifo"];

const UNITS: Readonly<Record<string, number>> = {
	"": 1,
	B: 1,
	KiB: 2 ** 10,
	MiB: 2 ** 20,
	GiB: 2 ** 30,
	TiB: 2 ** 40,
};

/** A flag's value. */
export function flag(name: string, text: string): Given {
	return { text, says: `--${name} ${text}` };
}

export function integer({ text, says }: Given, min: number, max: number): number {
	const value = /^\d+$/.test(text) ? Number(text) : Number.NaN;
	if (value >= min && value <= max) {
		return value;
	}
	throw invalid(`${says}: give an integer from ${min} to ${max}.`);
}

/** Undefined where it is off. */
export function portOrOff({ text, says }: Given): number | undefined {
	if (text === "off") {
		return undefined;
	}
	const port = /^\d+$/.test(text) ? Number(text) : Number.NaN;
	if (port <= 65_535) {
		return port;
	}
	throw invalid(`${says}: give a port from 0 to 65535, or off.`);
}

export function bytes(
	{ text, says }: Given,
	min = 1,
	max: number = Number.MAX_SAFE_INTEGER,
): number {
	const [, digits = "", unit = "none"] = /^(\d+(?:\.\d+)?)\s*(\w*)$/.exec(text) ?? [];
	const value = Math.floor(Number(digits) * (UNITS[unit] ?? Number.NaN));
	if (value >= min && value <= max) {
		return value;
	}
	if (value > 0 && value < min) {
		throw invalid(
			`${says} is ${value} bytes: give ${min} at least, with a unit such as MiB or GiB.`,
		);
	}
	if (value > max) {
		throw invalid(`${says} is more than the ${max} bytes that it may be.`);
	}
	throw invalid(`${says}: give a size such as 512MiB or 4GiB (B, KiB, MiB, GiB, TiB).`);
}

/** A size; 0 is one. */
export function bytesOrNone(given: Given): number {
	return given.text === "0" ? 0 : bytes(given);
}

export function oneOf<T extends string>({ text, says }: Given, known: readonly T[]): T {
	const found = known.find((one) => one === text);
	if (found === undefined) {
		throw invalid(`${says}: give one of ${known.join(", ")}.`);
	}
	return found;
}

export function policy(given: Given): EvictionPolicy {
	return oneOf(given, POLICIES);
}

export function trueOrFalse(given: Given): boolean {
	return oneOf(given, ["true", "false"]) === "true";
}

export function isLoopback(host: string): boolean {
	return (
		host === "localhost" ||
		(isIPv4(host) && host.startsWith("127.")) ||
		(isIPv6(host) && /^(0*:)+0*1$/.test(host))
	);
}

/**
 * Whether a server may listen there.
 *
 * @throws {@link KvferryError} `UNSUPPORTED_OPTION`.
 */
export function checkHost(host: Found | undefined, mayBePublic: boolean): void {
	const text = host?.text ?? "";
	if (isLoopback(text) || (mayBePublic && isIP(text) !== 0)) {
		return;
	}
	throw new KvferryError(
		"UNSUPPORTED_OPTION",
		`${host?.says ?? ""} is not a loopback address: give one (127.0.0.1), or an address of this machine with ` +
			"--listen-public and --token-file FILE; docs/security.md says what they protect.",
	);
}

export function httpUrl({ text, says }: Given): URL {
	const url = URL.canParse(text) ? new URL(text) : undefined;
	if (url?.protocol !== "http:" && url?.protocol !== "https:") {
		throw invalid(`${says}: give where the server answers HTTP, http://127.0.0.1:8080 say.`);
	}
	return url;
}
