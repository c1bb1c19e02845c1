// `node scripts/soak.mjs [--seconds N] [--json]`: mixed load on a server with a full pool and a disk, while
// engines are killed and stopped and files are damaged. Every byte that comes back is checked. In the end nothing
// may be leased or half-written, memory must have stayed flat, and no error may have come but those of the faults.
// Fails by its exit code. The long form takes 1800 seconds; the short one says nothing of memory.

import { fork, spawn } from "node:child_process";
import { once } from "node:events";
import {
	closeSync,
	mkdtempSync,
	openSync,
	readdirSync,
	readFileSync,
	rmSync,
	writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { root } from "./setup.mjs";

const ENGINES = 3;
const BYTES = 60_000;
const MEMORY = 16 * 2 ** 20;
const DISK = 64 * 2 ** 20;
/** From here on memory must be flat. */
const SETTLED_S = 300;

if (process.send) {
	await engine();
} else {
	await soak();
}

async function soak() {
	const { values } = parseArgs({
		options: {
			seconds: { type: "string", default: "1800" },
			json: { type: "boolean", default: false },
		},
	});
	const seconds = Number(values.seconds);
	const disk = mkdtempSync(join(tmpdir(), "kvferry-soak-"));
	const server = await serve(disk);
	const { Client } = await import("../dist/index.js");
	const client = await Client.connect({ url: server.url });
	/** @type {Record<string, number>} */
	const counts = { hits: 0, misses: 0, stored: 0, wrong: 0, killed: 0, stopped: 0, damaged: 0 };
	/** @type {Map<string, number>} */
	const errors = new Map();
	/** @type {ReturnType<typeof resident>[]} */
	const memory = [];
	const engines = Array.from({ length: ENGINES }, (_, number) => start(number));
	const begin = Date.now();
	const passed = () => (Date.now() - begin) / 1000;

	function start(/** @type {number} */ number) {
		const child = fork(fileURLToPath(import.meta.url), [server.url, String(number)]);
		child.on("message", (/** @type {any} */ told) => {
			for (const [name, count] of Object.entries(told.counts)) {
				counts[name] = (counts[name] ?? 0) + Number(count);
			}
			for (const code of told.errors) {
				errors.set(code, (errors.get(code) ?? 0) + 1);
			}
		});
		return child;
	}

	let faults = 0;
	while (passed() < seconds) {
		await sleep(1000);
		memory.push(resident(/** @type {number} */ (server.child.pid)));
		const number = faults++ % ENGINES;
		const victim = /** @type {import("node:child_process").ChildProcess} */ (engines[number]);
		if (faults % 3 === 0) {
			victim.kill("SIGKILL");
			await once(victim, "exit");
			engines[number] = start(number);
			counts.killed = (counts.killed ?? 0) + 1;
		} else if (faults % 3 === 1) {
			victim.kill("SIGSTOP");
			setTimeout(() => victim.kill("SIGCONT"), 500);
			counts.stopped = (counts.stopped ?? 0) + 1;
		} else if (damage(disk)) {
			counts.damaged = (counts.damaged ?? 0) + 1;
		}
	}
	for (const child of engines) {
		child.kill("SIGCONT");
		child.send("end");
		await once(child, "exit");
	}
	let status = await client.status();
	const open = () =>
		["leases", "slots_writing", "slots_reading", "slots_apart", "sessions", "instances"].filter(
			(name) => status[name] !== 0,
		);
	for (const until = Date.now() + 10_000; open().length > 0 && Date.now() < until; ) {
		await sleep(100);
		status = await client.status();
	}
	await client.close();
	server.child.kill();
	await once(server.child, "exit");
	rmSync(disk, { recursive: true });

	const settled = memory.slice(SETTLED_S);
	const growthOf = (/** @type {"own" | "all"} */ part) => {
		const bytes = settled.map((sample) => sample[part]);
		const third = bytes.length / 3;
		return bytes.length < 30
			? undefined
			: median(bytes.slice(-third)) / median(bytes.slice(0, third)) - 1;
	};
	const growth = growthOf("all");
	const failures = [
		...(counts.wrong ? [`${counts.wrong} chunks came back wrong`] : []),
		...[...errors].map(([code, count]) => `${count} errors ${code}`),
		...open().map((name) => `${name} is ${status[name]}`),
		...(growth !== undefined && Math.abs(growth) > 0.05
			? [`memory grew by ${(100 * growth).toFixed(1)} %`]
			: []),
		...(counts.hits && counts.stored ? [] : ["nothing was stored and found again"]),
	];
	const { evicted_objects, promoted_chunks, disk_damaged, disk_evicted_objects } = status;
	const figures = { evicted_objects, promoted_chunks, disk_damaged, disk_evicted_objects };
	const mebibytes = (memory.at(-1)?.all ?? 0) / 2 ** 20;
	const grown = { memory_growth: growth ?? null, own_memory_growth: growthOf("own") ?? null };
	const minutes = memory.filter((_, second) => second % 60 === 59);
	const own_kibibytes_by_minute = minutes.map(({ own }) => Math.round(own / 2 ** 10));
	const report = {
		seconds,
		...counts,
		...figures,
		mebibytes,
		...grown,
		own_kibibytes_by_minute,
		failures,
	};
	process.stdout.write(
		values.json ? `${JSON.stringify(report)}\n` : `${JSON.stringify(report, null, 2)}\n`,
	);
	process.exitCode = failures.length > 0 ? 1 : 0;
}

/** Stores and loads prompts of some tenants, some often and some once, until told to end. */
async function engine() {
	const { Client, PrefixCache } = await import("../dist/index.js");
	const [url = "", number = ""] = process.argv.slice(2);
	const client = await Client.connect({ url });
	const cache = await PrefixCache.open({ via: client, identity: "soak", bytesPerChunk: BYTES });
	let ended = false;
	process.once("message", () => {
		ended = true;
	});
	process.once("disconnect", () => process.exit());
	let counts = { hits: 0, misses: 0, stored: 0, wrong: 0 };
	/** @type {string[]} */
	let errors = [];
	for (let round = 0; !ended; round++) {
		const cacheSalt = `tenant ${Math.floor(Math.random() * 4)}`;
		const prompt =
			Math.floor(200 * Math.random() ** 3) +
			(round % 5 === 0 ? 1000 * (Number(number) + 1) + round : 0);
		const chunks = 1 + (prompt % 8);
		const tokens = Uint32Array.from(
			{ length: chunks * cache.chunkSize },
			(_, at) => prompt * 1_000_000 + at,
		);
		const bytes = (/** @type {number} */ chunk) =>
			new Uint8Array(Buffer.alloc(BYTES, `${cacheSalt} prompt ${prompt} chunk ${chunk};`));
		try {
			const options = { cacheSalt, timeoutMs: 20_000 };
			const hit = await cache.lookup(tokens, options);
			const loaded = await hit.load();
			counts.hits += loaded.length;
			counts.misses += chunks - loaded.length;
			counts.wrong += loaded.filter((chunk, at) => Buffer.compare(chunk, bytes(at)) !== 0).length;
			if (loaded.length < chunks) {
				const { storedChunks, failure } = await cache.store(tokens, bytes, options);
				counts.stored += storedChunks;
				errors.push(...(failure === undefined ? [] : [failure.code]));
			}
		} catch (error) {
			errors.push(/** @type {{ code?: string }} */ (error).code ?? String(error));
		}
		if (round % 100 === 0) {
			process.send?.({ counts, errors });
			counts = { hits: 0, misses: 0, stored: 0, wrong: 0 };
			errors = [];
		}
	}
	await cache.close();
	await client.close();
	process.send?.({ counts, errors }, () => process.disconnect());
}

async function serve(/** @type {string} */ disk) {
	const args = ["serve", "--port", "0", "--http-port", "off", "--chunk-size", "64", "--json"];
	const sizes = ["--memory", String(MEMORY), "--disk", disk, "--disk-size", String(DISK)];
	// JavaScript has so little to do here that its garbage would first be collected after 20 minutes: every minute, so
	// that what grows is what is kept.
	const collect = ["--expose-gc", "--import", "data:text/javascript,setInterval(gc,60000).unref()"];
	const program = [...collect, join(root, "dist", "cli", "main.js"), ...args, ...sizes];
	const child = spawn(process.execPath, program, { stdio: ["ignore", "pipe", "inherit"] });
	const [line] = await once(createInterface({ input: child.stdout }), "line");
	return { child, url: String(JSON.parse(line).url) };
}

/** Flips a byte in the middle of some file of the disk. */
function damage(/** @type {string} */ disk) {
	const directory = join(disk, "objects");
	const files = readdirSync(directory).filter((name) => !name.includes("tmp"));
	const name = files[Math.floor(Math.random() * files.length)];
	if (name === undefined) {
		return false;
	}
	try {
		const file = openSync(join(directory, name), "r+");
		writeSync(file, new Uint8Array([Math.floor(Math.random() * 256)]), 0, 1, 4096 + 1000);
		closeSync(file);
		return true;
	} catch {
		return false; // it went meanwhile
	}
}

/** Bytes that a process has in memory without the pool, which is shared and full: those of its own and all. */
function resident(/** @type {number} */ pid) {
	const status = readFileSync(`/proc/${pid}/status`, "utf8");
	const of = (/** @type {string} */ what) =>
		1024 * Number(new RegExp(`^${what}:\\s+(\\d+)`, "m").exec(status)?.[1]);
	return { own: of("RssAnon"), all: of("VmRSS") - of("RssShmem") };
}

function median(/** @type {number[]} */ values) {
	return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}
