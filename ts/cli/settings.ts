import { readFileSync, statSync } from "node:fs";
import { resolve } from "node:path";
import { invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import { otherName } from "../nearest.js";
import { logFormat } from "./log.js";
import { bytes, type Given, integer, policy, portOrOff, trueOrFalse } from "./values.js";

/** A setting of `kvferry serve`: its flag, its variable, its key in a file, its help and its row in the guide. */
export interface Setting<T = unknown> {
	/** What stands for its value in the help; absent: it is switched on by its flag, and its value is true or false. */
	readonly value?: string;
	readonly help: string;
	/** As it would be written; absent: none. */
	readonly default?: string;
	/** It is never shown. */
	readonly secret?: true;
	readonly read: (given: Given) => T;
}

/** By its name on the command line. */
export type Settings = Readonly<Record<string, Setting>>;

/** All of them. Whoever adds one adds it here, to {@link Server.start}, and to the table in docs/operators.md. */
export const SERVE = {
	host: {
		value: "HOST",
		help: "a loopback address; others need the next two",
		default: "127.0.0.1",
		read: ({ text }) => text,
	},
	"listen-public": {
		help: "other machines may reach it",
		default: "false",
		read: trueOrFalse,
	},
	"token-file": {
		value: "FILE",
		help: "who is let in: lines data = TOKEN, admin = TOKEN, metrics = TOKEN",
		read: ({ text }) => resolve(text),
	},
	ipc: {
		value: "PATH",
		help: "a Unix socket as well, in a directory of mode 0700",
		read: ({ text }) => resolve(text),
	},
	port: {
		value: "PORT",
		help: "0 takes a free one",
		default: "5555",
		read: (given) => integer(given, 0, 65_535),
	},
	"http-port": {
		value: "PORT",
		help: "page, /healthz, /readyz, /metrics; off for none",
		default: "8080",
		read: portOrOff,
	},
	"chunk-size": {
		value: "N",
		help: "tokens in a chunk",
		default: "256",
		read: (given) => integer(given, 1, 65_536),
	},
	memory: {
		value: "SIZE",
		help: "size of the shared-memory pool",
		default: "4GiB",
		read: (given) => bytes(given, 4096, 2 ** 44 - 4096),
	},
	"shm-name": {
		value: "NAME",
		help: "name of the pool in /dev/shm; by the port unless given",
		read: ({ text }) => text,
	},
	policy: {
		value: "NAME",
		help: "what goes when it is full: default, lru, arc, s3fifo",
		default: "default",
		read: policy,
	},
	disk: {
		value: "DIR",
		help: "directory that keeps chunks over restarts and beyond memory",
		read: ({ text }) => resolve(text),
	},
	"disk-size": {
		value: "SIZE",
		help: "size of what is in it",
		default: "20GiB",
		read: (given) => bytes(given, 8192),
	},
	remote: {
		value: "URL",
		help: "Redis or S3 that servers share: redis://HOST:6379/0, s3://BUCKET/PREFIX",
		read: ({ text }) => text,
	},
	quotas: {
		value: "FILE",
		help: "file of what tenants may have of the memory, written when that is changed",
		read: ({ text }) => resolve(text),
	},
	log: {
		value: "FORMAT",
		help: "what is written to stderr: text, json or off",
		default: "text",
		read: logFormat,
	},
} as const satisfies Settings;

/** The values of settings, by their names in camelCase; those without a value are missing. */
export type Values<T extends Settings> = {
	readonly [K in keyof T & string as Camel<K>]?: NonNullable<ReturnType<T[K]["read"]>>;
};

type Camel<T extends string> = T extends `${infer Head}-${infer Tail}`
	? `${Head}${Capitalize<Camel<Tail>>}`
	: T;

/** Where a setting's value was found. */
export interface Found {
	readonly source: "flag" | "environment" | "file" | "default";
	/** The flag, the variable or the file. */
	readonly place?: string;
	/** As it was written; absent where there is none. */
	readonly text?: string;
	/** The same and the value, as errors name them; absent for a default. */
	readonly says?: string;
	/** As it is used; absent where there is none, or it is off. */
	readonly value?: unknown;
}

/** The name of a setting's variable. */
export function variable(name: string): string {
	return `${PREFIX}${name.toUpperCase().replaceAll("-", "_")}`;
}

/** Not `KVFERRY_`: Kubernetes sets KVFERRY_PORT to something else where a service has this name. */
const PREFIX = "KVFERRY_SERVE_";
/** Of the file of settings. */
const FILE_MAX = 64 << 10;

/**
 * What each setting is, by flag, else variable, else file, else default.
 *
 * @param flags Values of flags, by name.
 * @param env Unknown variables with our prefix are refused.
 * @param fromFlag The file of settings, where a flag gives one.
 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `SYSTEM` for a file that cannot be read, or what a setting says of its
 * value. Values that another source overrides are checked too.
 */
export function findSettings(
	table: Settings,
	flags: Readonly<Record<string, string | boolean | undefined>>,
	env: Readonly<Record<string, string | undefined>>,
	fromFlag?: string,
): Map<string, Found> {
	const file = fromFlag ?? env[variable("config")];
	const variables = [...Object.keys(table), "config"].map((name) => variable(name));
	for (const name of Object.keys(env)) {
		if (name.startsWith(PREFIX) && !variables.includes(name)) {
			const known = variables.map((other) => other.slice(PREFIX.length));
			const other = otherName(name.slice(PREFIX.length), known, PREFIX);
			throw invalid(`${name} is no setting: ${other}`);
		}
	}
	const by = fromFlag === undefined ? variable("config") : "--config";
	const written = file ? readSettings(table, file, by) : {};
	const found = new Map<string, Found>();
	for (const [name, setting] of Object.entries(table)) {
		const candidates: (Omit<Found, "value"> & Given)[] = [];
		const add = (source: Found["source"], place: string, text: string, says: string) =>
			candidates.push({ source, place, text, says: setting.secret ? place : says });
		const flag = flags[name];
		if (flag !== undefined) {
			add("flag", `--${name}`, String(flag), `--${name} ${hidden(String(flag))}`);
		}
		const set = env[variable(name)];
		if (set) {
			add("environment", variable(name), set, `${variable(name)}=${hidden(set)}`); // an empty one is none
		}
		const text = written[name];
		if (file && text !== undefined) {
			add("file", file, text, `${file}: ${name} ${hidden(text)}`);
		}
		const read = candidates.map(({ says, ...rest }) => {
			const { text = "" } = rest;
			if (text === "") {
				throw invalid(`${says.trim()} is empty: is a variable missing that it is read from?`);
			}
			return { ...rest, says, value: setting.read({ text, says }) };
		});
		const byDefault = setting.default;
		found.set(
			name,
			read[0] ??
				(byDefault === undefined
					? { source: "default" }
					: {
							source: "default",
							text: byDefault,
							value: setting.read({ text: byDefault, says: name }),
						}),
		);
	}
	return found;
}

/** The values alone. */
export function valuesOf<T extends Settings>(found: ReadonlyMap<string, Found>): Values<T> {
	const camel = (name: string) =>
		name.replace(/-(\w)/g, (_, letter: string) => letter.toUpperCase());
	const values = [...found].filter(([, { value }]) => value !== undefined);
	return Object.fromEntries(values.map(([name, { value }]) => [camel(name), value])) as Values<T>;
}

/** A file of settings: one JSON object of texts, numbers, true and false. */
function readSettings(table: Settings, file: string, by: string): Record<string, string> {
	let text: string;
	try {
		const status = statSync(file);
		if (!status.isFile() || status.size > FILE_MAX) {
			throw invalid(`${by} ${file}: give a file of ${FILE_MAX} bytes at most.`);
		}
		text = readFileSync(file, "utf8");
	} catch (error) {
		if (error instanceof KvferryError) {
			throw error;
		}
		throw new KvferryError("SYSTEM", `${by} ${file}: ${(error as Error).message}`, {
			cause: error,
		});
	}
	let written: unknown;
	try {
		written = JSON.parse(text);
	} catch (error) {
		throw invalid(
			`${file}: ${(error as Error).message}; give a JSON object such as {"port": 5555}, without comments.`,
		);
	}
	if (typeof written !== "object" || written === null || Array.isArray(written)) {
		throw invalid(`${file}: give a JSON object such as {"port": 5555}.`);
	}
	const known = Object.keys(table);
	const entries = Object.entries(written).map(([name, value]) => {
		if (!known.includes(name)) {
			throw invalid(`${file}: ${name} is no setting: ${otherName(name, known)}`);
		}
		if (!["string", "number", "boolean"].includes(typeof value)) {
			throw invalid(`${file}: ${name} takes a text, a number, true or false.`);
		}
		return [name, String(value)];
	});
	const keys = [...text.matchAll(/"((?:[^"\\]|\\.)*)"(\s*:)?/g)].filter(([, , colon]) => colon);
	const twice = keys.find(([, key], at) => keys.findIndex(([, other]) => other === key) < at);
	if (twice !== undefined) {
		throw invalid(`${file}: ${twice[1]} comes twice; leave one of them out.`);
	}
	return Object.fromEntries(entries);
}

/** What `--print-config` prints: each setting's value and where it is from. */
export function settingsTable(table: Settings, found: ReadonlyMap<string, Found>): string {
	const rows = [...found].map(([name, { source, place, text }]) => {
		const shown = text === undefined ? "none" : table[name]?.secret ? "(hidden)" : hidden(text);
		return [name, shown, place ?? source];
	});
	const all = [["setting", "value", "source"], ...rows];
	const widths = [0, 1].map((at) => Math.max(...all.map((row) => row[at]?.length ?? 0)));
	return all
		.map((row) => `${row.map((cell, at) => cell.padEnd(widths[at] ?? 0)).join("  ")}\n`)
		.join("");
}

/** The same for programs. */
export function settingsJson(table: Settings, found: ReadonlyMap<string, Found>): object {
	const entries = [...found].map(([name, { source, place, value }]) => {
		const shown = typeof value === "string" ? hidden(value) : (value ?? null);
		const told = table[name]?.secret && value !== undefined ? "(hidden)" : shown;
		return [name, { value: told, source, ...(place === undefined ? {} : { place }) }];
	});
	return { settings: Object.fromEntries(entries) };
}

/** A parameter of an address that may be shown. An endpoint may have a password in it, encoded. */
const SHOWN = /^(region|endpoint|prefix)=(?!.*%40)/;

/** Who asks, and what of an address's parameters may be a password, is nobody's to read: as `redacted` of kvferry-remote. */
export function hidden(text: string): string {
	const [, start, rest = ""] = /^(\w[\w+.-]*:\/\/)(.*)$/s.exec(text) ?? [];
	if (start === undefined) {
		return text;
	}
	// Up to the last @: a password may have any of / ? @ in it, written as they are.
	const host = rest.slice(rest.lastIndexOf("@") + 1);
	const of = host === rest ? "" : "(hidden)@";
	const [place = "", ...queries] = host.split("?");
	const query = queries
		.join("?")
		.split("&")
		.map((pair) => (SHOWN.test(pair) ? pair : pair.replace(/=.*/s, "=(hidden)")))
		.join("&");
	return `${start}${of}${place}${queries.length === 0 ? "" : `?${query}`}`;
}

/** The lines of the help. */
export function settingsHelp(table: Settings): string {
	return Object.entries(table)
		.map(([name, { value, help, default: byDefault }]) => {
			const flag = value === undefined ? `--${name}` : `--${name} ${value}`;
			return `             ${flag.padEnd(18)} ${help}${byDefault === undefined ? "" : ` (${byDefault})`}\n`;
		})
		.join("");
}
