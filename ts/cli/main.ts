#!/usr/bin/env node
import { createRequire } from "node:module";
import { KvferryError } from "../errors.js";
import { nearest } from "../nearest.js";
import { SERVE, settingsHelp } from "./settings.js";

/** A command: what it does with the arguments after its name. */
type Command = (args: string[]) => Promise<void>;

/** Commands, and the lines of the help that are theirs. */
const HELP: readonly (readonly [names: string, lines: string])[] = [
	[
		"serve",
		`  serve    run a cache server until SIGINT, SIGTERM or SIGHUP
${settingsHelp(SERVE)}             --config FILE      file of settings: a JSON object, with these names without --
             --print-config     print each setting with its source, and start nothing
             A flag goes before a variable, KVFERRY_SERVE_HTTP_PORT say, and that before the file.
`,
	],
	[
		"ping status clear",
		`  ping     tell how long a server takes to answer
  status   tell what a server holds; on a terminal again and again, until Ctrl-C
  clear    empty a server's cache, but for what is leased or being written
             --url URL          the server (tcp://127.0.0.1:5555)
             --token-file FILE  its token, else KVFERRY_TOKEN of the environment; clear and status take the admin's
             --timeout-ms N     wait for it at most that long (3000)
`,
	],
	[
		"quota",
		`  quota    list what tenants may have of the memory, and have; quota set changes it, quota unset takes it back
             --salt SALT        the tenant; "" for requests without a salt
             --default          instead: each tenant without a quota of its own
             --cap SIZE         it has that much at most (no bound)
             --guarantee SIZE   others never make it have less (0)
             --http URL         where the server answers HTTP (http://127.0.0.1:8080)
             --token-file FILE  its admin token, else KVFERRY_TOKEN of the environment
             --timeout-ms N     wait for it at most that long (3000)
`,
	],
	[
		"doctor",
		`  doctor   tell why a prompt misses; exits with 1 when anything is found
             --url URL          the server (tcp://127.0.0.1:5555); --server is the same
             --token-file FILE  its admin token, else KVFERRY_TOKEN of the environment
             --timeout-ms N     wait for each answer at most that long (3000)
             --tokens FILE      the prompt's token ids, as JSON or separated by spaces; - is stdin
             --model NAME       the model, as its engine registers it
             --world-size N     its KV world size (1)
             --identity TEXT    instead of a model: a PrefixCache's identity; the engines' caches tell theirs, cache.identity
             --salt SALT        the tenant
             --chunk-size N     tokens in a chunk, as the engine takes it
             --hash-algorithm NAME, --hash-seed SEED
                                how the engine hashes chunks
`,
	],
	[
		"bench",
		`  bench    store, look up and load through a server, and tell how long it takes
             --url URL          the server; unless given, one of its own
             --http URL         where that answers HTTP (http://127.0.0.1:8080)
             --token-file FILE  its admin token, else KVFERRY_TOKEN of the environment
             --size SIZE        of all that is stored (256MiB); the server must have twice that free
             --chunk-bytes SIZE of one chunk; a prompt has 16 (1MiB)
             --timeout-ms N     wait for each answer, and for room, at most that long (3000)
`,
	],
	[
		"replay",
		`  replay FILE  tell how often recorded requests would have hit: one JSON object a line with timestamp
             (ms) and hash_ids; - is stdin
             --capacity BLOCKS  room for so many
             --policy NAME      as for serve (default)
`,
	],
];

const ALL = `Every command takes --json: one JSON object on stdout, errors as JSON on stderr.
  --help     print this, or after a command what that takes
  --version  print the version
`;

/** The help of a command, or of all. */
function usage(command: string | undefined): string {
	const own = HELP.filter(([names]) => command !== undefined && names.split(" ").includes(command));
	const named = command === "replay" ? "replay FILE" : command;
	const [name, found] = own.length > 0 ? [named, own] : ["COMMAND", HELP];
	const lines = found.map(([, lines]) => lines).join("");
	return `Usage: kvferry ${name} [OPTIONS]\n\nCommands\n${lines}\n${ALL}`;
}

/** Each command is loaded when it is asked for: `--version` needs no addon. */
const COMMANDS: ReadonlyMap<string, () => Promise<Command>> = new Map([
	["serve", async () => (await import("./serve.js")).serve],
	["ping", async () => (await import("./query.js")).ping],
	["status", async () => (await import("./status.js")).status],
	["quota", async () => (await import("./quota.js")).quota],
	["clear", async () => (await import("./query.js")).clear],
	["bench", async () => (await import("./bench.js")).bench],
	["replay", async () => (await import("./replay.js")).replay],
	["doctor", async () => (await import("./doctor.js")).doctor],
]);

async function main([name, ...args]: string[]): Promise<void> {
	if (
		name === undefined ||
		name === "help" ||
		[name, ...args].some((arg) => arg === "--help" || arg === "-h")
	) {
		process.stdout.write(usage(name === "help" ? args[0] : name));
		return;
	}
	if (name === "-v" || [name, ...args].includes("--version")) {
		process.stdout.write(`${version()}\n`);
		return;
	}
	const load = COMMANDS.get(name);
	if (load === undefined) {
		const known = [...COMMANDS.keys()];
		const near = nearest(name, known);
		throw new KvferryError(
			"INVALID_ARGUMENT",
			`${name} is no command: ${near === undefined ? "there" : `did you mean ${near}? There`} are ${known.join(", ")}, and --help.`,
		);
	}
	const command = await load();
	await command(args);
}

function version(): string {
	const manifest: { version: string } = createRequire(import.meta.url)("kvferry/package.json");
	return manifest.version;
}

function report(error: unknown, json: boolean): void {
	const code = error instanceof KvferryError ? error.code : "INTERNAL";
	const said = error instanceof Error ? error.message : String(error);
	const remedy = code === "UNAUTHORIZED" ? ". Here: --token-file FILE, or KVFERRY_TOKEN." : "";
	const message = `${remedy === "" ? said : said.replace(/\.$/, "")}${remedy}`;
	process.stderr.write(json ? `${JSON.stringify({ code, message })}\n` : `${code}: ${message}\n`);
}

// A reader that has seen enough (head, say) is no error.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
	if (error.code === "EPIPE") {
		process.exit();
	}
	report(new KvferryError("SYSTEM", `stdout: ${error.message}`), process.argv.includes("--json"));
	process.exit(1);
});

const args = process.argv.slice(2);
try {
	await main(args);
} catch (error) {
	report(error, args.includes("--json"));
	process.exitCode = 1;
}
