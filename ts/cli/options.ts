import { createHash } from "node:crypto";
import { resolve } from "node:path";
import { type ParseArgsConfig, parseArgs } from "node:util";
import { checkSalt, invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import { otherName } from "../nearest.js";
import type { EvictionPolicy } from "../server.js";
import {
	type Found,
	findSettings,
	SERVE,
	type Settings,
	type Values,
	valuesOf,
} from "./settings.js";
import { bytes, bytesOrNone, checkHost, flag, httpUrl, integer, policy } from "./values.js";

const SERVER = "tcp://127.0.0.1:5555";
/** Bytes that a benchmark may store. */
const BENCH_MAX = 4 * 2 ** 30;
/** Prompts that `kvferry bench` stores at most: more tell no more, and take minutes. */
const BENCH_PROMPTS_MAX = 65_536;

/** What `kvferry serve` was asked for. */
export interface ServeOptions {
	/** Where each setting is from. */
	readonly found: ReadonlyMap<string, Found>;
	readonly settings: Values<typeof SERVE>;
	/** Settings are printed, and nothing is started. */
	readonly printConfig: boolean;
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
	/** File with the admin's token; the environment's where absent. */
	readonly tokenFile?: string;
	readonly timeoutMs: number;
	readonly json: boolean;
}

/** What `kvferry ping`, `kvferry status` and `kvferry clear` were asked for. */
export interface ClientOptions {
	readonly url: string;
	/** File with a token; the environment's where absent. */
	readonly tokenFile?: string;
	readonly timeoutMs: number;
	readonly json: boolean;
}

/** What `kvferry bench` was asked for. */
export interface BenchOptions {
	/** The server; absent: one of its own. */
	readonly url?: string;
	/** Where it answers HTTP. */
	readonly http: URL;
	/** File with the admin's token; the environment's where absent. */
	readonly tokenFile?: string;
	/** Of all objects together. */
	readonly bytes: number;
	readonly chunkBytes: number;
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

/**
 * Reads the flags of `kvferry serve`, its variables and its file.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `SYSTEM` for a file that cannot be read, or `UNSUPPORTED_OPTION` for
 * a host that is not loopback without what that needs.
 */
export function serveOptions(
	args: string[],
	env: Readonly<Record<string, string | undefined>> = process.env,
): ServeOptions {
	const flags = Object.entries(SERVE satisfies Settings as Settings).map(([name, { value }]) => [
		name,
		{ type: value === undefined ? "boolean" : "string" },
	]);
	const values = parse(args, {
		...(Object.fromEntries(flags) as Record<string, { type: "string" | "boolean" }>),
		config: { type: "string" },
		"print-config": { type: "boolean", default: false },
		json: { type: "boolean", default: false },
	}) as Record<string, string | boolean | undefined>;
	const { config, "print-config": printConfig, json, ...given } = values;
	const found = findSettings(SERVE, given, env, config as string | undefined);
	const settings = valuesOf<typeof SERVE>(found);
	const size = found.get("disk-size");
	if (settings.disk === undefined && size?.source !== "default") {
		throw invalid(`${size?.says} has no use here: give the directory, --disk DIR, too.`);
	}
	checkHost(found.get("host"), settings.listenPublic === true && settings.tokenFile !== undefined);
	return {
		found,
		settings,
		printConfig: printConfig === true,
		json: json === true,
	};
}

/**
 * Reads the flags of `kvferry ping`, `kvferry status` and `kvferry clear`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`.
 */
export function clientOptions(args: string[]): ClientOptions {
	const values = parse(args, {
		url: { type: "string", default: SERVER },
		"token-file": { type: "string" },
		"timeout-ms": { type: "string", default: "3000" },
		json: { type: "boolean", default: false },
	});
	return {
		url: values.url,
		...fileOf(values["token-file"]),
		timeoutMs: integer(flag("timeout-ms", values["timeout-ms"]), 1, 2 ** 31 - 1),
		json: values.json,
	};
}

/**
 * Reads the flags of `kvferry bench`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT`.
 */
export function benchOptions(args: string[]): BenchOptions {
	const values = parse(args, {
		url: { type: "string" },
		http: { type: "string" },
		size: { type: "string", default: "256MiB" },
		"chunk-bytes": { type: "string", default: "1MiB" },
		"token-file": { type: "string" },
		"timeout-ms": { type: "string", default: "3000" },
		json: { type: "boolean", default: false },
	});
	for (const name of ["http", "token-file"] as const) {
		if (values[name] !== undefined && values.url === undefined) {
			throw invalid(`--${name} ${values[name]} has no use here: give the server's --url too.`);
		}
	}
	const [size, chunk] = [flag("size", values.size), flag("chunk-bytes", values["chunk-bytes"])];
	const total = bytes(size);
	const chunkBytes = bytes(chunk);
	if (total > BENCH_MAX) {
		throw invalid(`${size.says}: give 4GiB at most.`);
	}
	if (chunkBytes > total / 16) {
		throw invalid(`${chunk.says}: 16 of them make a prompt, and have room in --size.`);
	}
	const least = Math.ceil(total / 16 / BENCH_PROMPTS_MAX);
	if (chunkBytes < least) {
		throw invalid(
			`${chunk.says}: 16 of them make a prompt, and ${size.says} has more than ${BENCH_PROMPTS_MAX}; give ${least} at least.`,
		);
	}
	return {
		...(values.url === undefined ? {} : { url: values.url }),
		...fileOf(values["token-file"]),
		http: httpUrl(flag("http", values.http ?? "http://127.0.0.1:8080")),
		bytes: total,
		chunkBytes,
		timeoutMs: integer(flag("timeout-ms", values["timeout-ms"]), 1, 2 ** 31 - 1),
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
		"token-file": { type: "string" },
		"timeout-ms": { type: "string", default: "3000" },
		json: { type: "boolean", default: false },
	} as const;
	const { values, positionals } = parsed(args, options, () =>
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
		...(cap === undefined ? {} : { cap: bytesOrNone(flag("cap", cap)) }),
		...(guarantee === undefined ? {} : { guarantee: bytesOrNone(flag("guarantee", guarantee)) }),
		http: httpUrl(flag("http", values.http)),
		...fileOf(values["token-file"]),
		timeoutMs: integer(flag("timeout-ms", values["timeout-ms"]), 1, 2 ** 31 - 1),
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
	const { values, positionals } = parsed(args, options, () =>
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
		capacity: integer(flag("capacity", values.capacity), 1, 2 ** 30),
		policy: policy(flag("policy", values.policy)),
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
		url: { type: "string" },
		server: { type: "string" },
		"token-file": { type: "string" },
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
	const { url, server = url, tokens: file, model, identity, salt } = values;
	if (url !== undefined && url !== server) {
		throw invalid(`--url ${url} and --server ${server}: give one of them; they mean the same.`);
	}
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
	for (const [name, text] of Object.entries({ model, identity })) {
		if (text === "") {
			throw invalid(
				`--${name} is empty: give the text that the engine gives; is a file missing that it is read from?`,
			);
		}
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
		kvWorldSize: integer(flag("world-size", worldSize ?? "1"), 1, 255),
		cacheSalt: checkSalt(salt),
	};
	return {
		url: server ?? SERVER,
		...fileOf(values["token-file"]),
		timeoutMs: integer(flag("timeout-ms", values["timeout-ms"]), 1, 2 ** 31 - 1),
		...(file === undefined ? {} : { prompt: { file, ...prompt } }),
		...(chunkSize === undefined
			? {}
			: { chunkSize: integer(flag("chunk-size", chunkSize), 1, 65_536) }),
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
	return parsed(args, options, () => parseArgs({ args, options, allowPositionals: false })).values;
}

function parsed<T>(
	args: string[],
	options: NonNullable<ParseArgsConfig["options"]>,
	parse: () => T,
): T {
	let result: T;
	try {
		result = parse();
	} catch (error) {
		const { message } = error as Error;
		const [, dashes = "", unknown] = /^Unknown option '(-*)(.+?)'/.exec(message) ?? [];
		throw new KvferryError(
			"INVALID_ARGUMENT",
			unknown === undefined
				? message
				: `${dashes}${unknown} is no flag here: ${otherName(unknown, Object.keys(options), "--")}`,
			{ cause: error },
		);
	}
	// The last one would count, and nobody would be told.
	const { tokens } = parseArgs({ args, options, strict: false, tokens: true });
	const given = new Map<string, string>();
	for (const token of tokens) {
		if (token.kind !== "option" || token.value === undefined) {
			continue;
		}
		const before = given.get(token.name);
		if (before !== undefined && before !== token.value) {
			throw invalid(`--${token.name} is given twice; leave one of them out.`);
		}
		given.set(token.name, token.value);
	}
	return result;
}

function fileOf(tokenFile: string | undefined): { tokenFile?: string } {
	return tokenFile === undefined ? {} : { tokenFile: resolve(tokenFile) };
}
