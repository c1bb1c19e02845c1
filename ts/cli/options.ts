import { createHash } from "node:crypto";
import { isIPv4, isIPv6 } from "node:net";
import { resolve } from "node:path";
import { type ParseArgsConfig, parseArgs } from "node:util";
import { checkSalt, invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import type { EvictionPolicy } from "../server.js";

/** What `kvferry serve` was asked for. */
export interface ServeOptions {
	readonly host: string;
	readonly port: number;
	/** Where HTTP is answered; absent: nowhere. */
	readonly httpPort?: number;
	/** Tokens in a chunk. */
	readonly chunkSize: number;
	/** Size of the pool in bytes. */
	readonly memory: number;
	/** Name of the pool in /dev/shm; the server's own choice where absent. */
	readonly shmName?: string;
	readonly policy: EvictionPolicy;
	/** Directory of the disk tier; none where absent. */
	readonly disk?: string;
	/** Size of the disk tier in bytes. */
	readonly diskSize: number;
	/** URL of the remote tier; none where absent. */
	readonly remote?: string;
	/** File of the tenants' quotas; none where absent. */
	readonly quotas?: string;
	readonly json: boolean;
}

/** What `kvferry quota` was asked for. */
export interface QuotaOptions {
	readonly action: "list" | "set" | "unset";
	/** Whose quota; absent: of each tenant that has none of its own, or of all in a list. */
	readonly salt?: string;
	/** Bytes. */
	readonly cap?: number;
	/** Bytes. */
	readonly guarantee?: number;
	/** Where the server answers HTTP. */
	readonly http: URL;
	readonly timeoutMs: number;
	readonly json: boolean;
}

/** What `kvferry ping`, `kvferry status` and `kvferry clear` were asked for. */
export interface ClientOptions {
	readonly url: string;
	readonly timeoutMs: number;
	readonly json: boolean;
}

/** What `kvferry doctor` was asked for. */
export interface DoctorOptions extends ClientOptions {
	/** Whose prompt misses. */
	readonly prompt?: {
		/** Where its token ids are; "-" is stdin. */
		readonly file: string;
		readonly modelName: string;
		readonly kvWorldSize: number;
		readonly cacheSalt: string;
	};
	/** What the engine takes the server's chunks to be, as far as it was told. */
	readonly chunkSize?: number;
	readonly hashAlgorithm?: string;
	readonly hashSeed?: string;
}

/** What `kvferry replay` was asked for. */
export interface ReplayOptions {
	/** "-" is stdin. */
	readonly file: string;
	/** Blocks. */
	readonly capacity: number;
	readonly policy: EvictionPolicy;
	readonly json: boolean;
}

/** Flags that a later version of `kvferry serve` takes. */
const LATER = ["config"] as const;

const POLICIES: readonly EvictionPolicy[] = ["default", "lru", "arc", "s3fifo"];

const UNITS: Readonly<Record<string, number>> = {
	"": 1,
	B: 1,
	KiB: 2 ** 10,
	MiB: 2 ** 20,
	GiB: 2 ** 30,
	TiB: 2 ** 40,
};

/**
 * Reads the flags of `kvferry serve`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`, or `UNSUPPORTED_OPTION` for what a later version
 * takes: its flags, and hosts other than loopback.
 */
export function serveOptions(args: string[]): ServeOptions {
	const values = parse(args, {
		host: { type: "string", default: "127.0.0.1" },
		port: { type: "string", default: "5555" },
		"http-port": { type: "string", default: "8080" },
		"chunk-size": { type: "string", default: "256" },
		memory: { type: "string", default: "4GiB" },
		"shm-name": { type: "string" },
		json: { type: "boolean", default: false },
		disk: { type: "string" },
		"disk-size": { type: "string", default: "20GiB" },
		quotas: { type: "string" },
		remote: { type: "string" },
		policy: { type: "string", default: "default" },
		config: { type: "string" },
	});
	for (const flag of LATER) {
		if (values[flag] !== undefined) {
			throw new KvferryError(
				"UNSUPPORTED_OPTION",
				`--${flag} ${values[flag]}: this version has no such flag; leave it out.`,
			);
		}
	}
	const { "shm-name": shmName, "http-port": httpPort } = values;
	return {
		host: loopback(values.host),
		port: integer("port", values.port, 0, 65_535),
		...(httpPort === "off" ? {} : { httpPort: portOrOff("http-port", httpPort) }),
		chunkSize: integer("chunk-size", values["chunk-size"], 1, 65_536),
		memory: bytes("memory", values.memory),
		...(shmName === undefined ? {} : { shmName }),
		policy: policy(values.policy),
		...(values.disk === undefined ? {} : { disk: resolve(values.disk) }),
		diskSize: bytes("disk-size", values["disk-size"]),
		...(values.remote === undefined ? {} : { remote: values.remote }),
		...(values.quotas === undefined ? {} : { quotas: resolve(values.quotas) }),
		json: values.json,
	};
}

/**
 * Reads the flags of `kvferry ping`, `kvferry status` and `kvferry clear`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`.
 */
export function clientOptions(args: string[]): ClientOptions {
	const values = parse(args, {
		url: { type: "string", default: "tcp://127.0.0.1:5555" },
		"timeout-ms": { type: "string", default: "3000" },
		json: { type: "boolean", default: false },
	});
	return {
		url: values.url,
		timeoutMs: integer("timeout-ms", values["timeout-ms"], 1, 2 ** 31 - 1),
		json: values.json,
	};
}

/**
 * Reads the flags of `kvferry quota`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `INVALID_SALT`.
 */
export function quotaOptions(args: string[]): QuotaOptions {
	const options = {
		salt: { type: "string" },
		default: { type: "boolean", default: false },
		cap: { type: "string" },
		guarantee: { type: "string" },
		http: { type: "string", default: "http://127.0.0.1:8080" },
		"timeout-ms": { type: "string", default: "3000" },
		json: { type: "boolean", default: false },
	} as const;
	const { values, positionals } = parsed(() =>
		parseArgs({ args, options, allowPositionals: true }),
	);
	const [action = "list", ...others] = positionals;
	if ((action !== "list" && action !== "set" && action !== "unset") || others.length > 0) {
		throw invalid(
			`kvferry quota ${positionals.join(" ")}: give set or unset, or nothing to list quotas.`,
		);
	}
	const { salt, cap, guarantee } = values;
	const idle = action === "set" ? {} : { cap, guarantee };
	for (const [flag, value] of Object.entries({ ...idle, ...(action === "list" ? { salt } : {}) })) {
		if (value !== undefined) {
			throw invalid(
				`--${flag} ${flag === "salt" ? "" : `${value} `}has no use here: give set first.`,
			);
		}
	}
	if (action === "set" && (salt === undefined) !== values.default) {
		throw invalid("kvferry quota set takes --salt SALT or --default: say whose quota.");
	}
	if (action !== "set" && values.default) {
		throw invalid("--default has no use here: kvferry quota set --default takes its bounds away.");
	}
	if (action === "unset" && salt === undefined) {
		throw invalid("kvferry quota unset takes --salt SALT: say whose quota.");
	}
	return {
		action,
		...(salt === undefined ? {} : { salt: checkSalt(salt) }),
		...(cap === undefined ? {} : { cap: bytesOrNone("cap", cap) }),
		...(guarantee === undefined ? {} : { guarantee: bytesOrNone("guarantee", guarantee) }),
		http: httpUrl(values.http),
		timeoutMs: integer("timeout-ms", values["timeout-ms"], 1, 2 ** 31 - 1),
		json: values.json,
	};
}

/**
 * Reads the flags of `kvferry replay`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`.
 */
export function replayOptions(args: string[]): ReplayOptions {
	const options = {
		capacity: { type: "string" },
		policy: { type: "string", default: "default" },
		json: { type: "boolean", default: false },
	} as const;
	const { values, positionals } = parsed(() =>
		parseArgs({ args, options, allowPositionals: true }),
	);
	const [file, ...others] = positionals;
	if (file === undefined || others.length > 0) {
		throw invalid("kvferry replay takes one FILE: one JSON object a line, - for stdin.");
	}
	if (values.capacity === undefined) {
		throw invalid("--capacity BLOCKS is missing: say how many blocks the cache holds.");
	}
	return {
		file,
		capacity: integer("capacity", values.capacity, 1, 2 ** 30),
		policy: policy(values.policy),
		json: values.json,
	};
}

/**
 * Reads the flags of `kvferry doctor`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`.
 */
export function doctorOptions(args: string[]): DoctorOptions {
	const values = parse(args, {
		server: { type: "string", default: "tcp://127.0.0.1:5555" },
		"timeout-ms": { type: "string", default: "3000" },
		tokens: { type: "string" },
		model: { type: "string" },
		identity: { type: "string" },
		"world-size": { type: "string" },
		salt: { type: "string" },
		"chunk-size": { type: "string" },
		"hash-algorithm": { type: "string" },
		"hash-seed": { type: "string" },
		json: { type: "boolean", default: false },
	});
	const { tokens: file, model, identity, salt } = values;
	const { "chunk-size": chunkSize, "hash-algorithm": hashAlgorithm, "hash-seed": seed } = values;
	const worldSize = values["world-size"];
	const of = [model, identity].filter((name) => name !== undefined);
	if (of.length > 1) {
		throw invalid("--model and --identity: give one of them; an identity is a model's name.");
	}
	if (file !== undefined && of.length === 0) {
		throw invalid(
			`--tokens ${file}: say whose prompt it is, with --model NAME, or for a PrefixCache with ` +
				"--identity TEXT.",
		);
	}
	const idle = { model, identity, salt, "world-size": worldSize };
	for (const [flag, value] of Object.entries(idle)) {
		if (file === undefined && value !== undefined) {
			throw invalid(`--${flag} ${value}: give the prompt too, with --tokens FILE.`);
		}
	}
	if (identity !== undefined && worldSize !== undefined) {
		throw invalid(`--world-size ${worldSize}: a PrefixCache has no ranks; leave it out.`);
	}
	const prompt = {
		modelName: model ?? `kvferry/${sha256(identity ?? "")}`,
		kvWorldSize: integer("world-size", worldSize ?? "1", 1, 255),
		cacheSalt: checkSalt(salt),
	};
	return {
		url: values.server,
		timeoutMs: integer("timeout-ms", values["timeout-ms"], 1, 2 ** 31 - 1),
		...(file === undefined ? {} : { prompt: { file, ...prompt } }),
		...(chunkSize === undefined ? {} : { chunkSize: integer("chunk-size", chunkSize, 1, 65_536) }),
		...(hashAlgorithm === undefined ? {} : { hashAlgorithm }),
		...(seed === undefined ? {} : { hashSeed: seed }),
		json: values.json,
	};
}

/** As `PrefixCache` names its model by its identity. */
function sha256(text: string): string {
	return createHash("sha256").update(text).digest("hex");
}

function parse<T extends NonNullable<ParseArgsConfig["options"]>>(args: string[], options: T) {
	return parsed(() => parseArgs({ args, options, allowPositionals: false })).values;
}

function parsed<T>(parse: () => T): T {
	try {
		return parse();
	} catch (error) {
		throw new KvferryError("INVALID_ARGUMENT", (error as Error).message, { cause: error });
	}
}

function policy(name: string): EvictionPolicy {
	const known = POLICIES.find((policy) => policy === name);
	if (known === undefined) {
		throw invalid(`--policy ${name}: give one of ${POLICIES.join(", ")}.`);
	}
	return known;
}

function loopback(host: string): string {
	if (host === "localhost" || (isIPv4(host) && host.startsWith("127."))) {
		return host;
	}
	if (isIPv6(host) && /^(0*:)+0*1$/.test(host)) {
		return host;
	}
	throw new KvferryError(
		"UNSUPPORTED_OPTION",
		`--host ${host} is not a loopback address: this version serves its own machine only; ` +
			"use 127.0.0.1.",
	);
}

function integer(flag: string, text: string, min: number, max: number): number {
	const value = /^\d+$/.test(text) ? Number(text) : Number.NaN;
	if (value >= min && value <= max) {
		return value;
	}
	throw new KvferryError(
		"INVALID_ARGUMENT",
		`--${flag} ${text}: give an integer from ${min} to ${max}.`,
	);
}

function portOrOff(flag: string, text: string): number {
	const port = /^\d+$/.test(text) ? Number(text) : Number.NaN;
	if (port <= 65_535) {
		return port;
	}
	throw invalid(`--${flag} ${text}: give a port from 0 to 65535, or off.`);
}

function httpUrl(text: string): URL {
	const url = URL.canParse(text) ? new URL(text) : undefined;
	if (url?.protocol !== "http:") {
		throw invalid(`--http ${text}: give where the server answers HTTP, http://127.0.0.1:8080 say.`);
	}
	return url;
}

/** A size; 0 is one. */
function bytesOrNone(flag: string, text: string): number {
	return text === "0" ? 0 : bytes(flag, text);
}

function bytes(flag: string, text: string): number {
	const [, digits = "", unit = "none"] = /^(\d+(?:\.\d+)?)\s*(\w*)$/.exec(text) ?? [];
	const value = Math.floor(Number(digits) * (UNITS[unit] ?? Number.NaN));
	if (Number.isSafeInteger(value) && value > 0) {
		return value;
	}
	throw new KvferryError(
		"INVALID_ARGUMENT",
		`--${flag} ${text}: give a size such as 512MiB or 4GiB (B, KiB, MiB, GiB, TiB).`,
	);
}
