import { Client } from "../client.js";
import type { Status } from "../server.js";
import { tokenOf } from "../token.js";
import { type ClientOptions, clientOptions } from "./options.js";
import { drawStatus, type Sample } from "./view.js";

/** Between two looks at the server. */
const PERIOD_MS = 1000;
/** Looks that are kept: a minute. */
const KEPT = 60;
/** The other screen, without a cursor; and back. */
const ENTER = "\x1b[?1049h\x1b[?25l";
const LEAVE = "\x1b[?25h\x1b[?1049l";

/** `kvferry status`: what the server says of itself, once; on a terminal again and again, until Ctrl-C. */
export async function status(args: string[]): Promise<void> {
	const options = clientOptions(args);
	if (process.stdout.isTTY && process.env.TERM !== "dumb" && !options.json) {
		await live(options);
		return;
	}
	await using client = await Client.connect(connection(options));
	const fields = await client.status({ timeoutMs: options.timeoutMs });
	if (options.json) {
		process.stdout.write(`${JSON.stringify(fields)}\n`);
		return;
	}
	const width = Math.max(...Object.keys(fields).map((name) => name.length));
	for (const [name, value] of Object.entries(fields)) {
		process.stdout.write(`${name.padEnd(width)}  ${value}\n`);
	}
}

function connection(options: ClientOptions): { url: string; timeoutMs: number; token?: string } {
	const { url, timeoutMs } = options;
	const token = tokenOf(options, ["admin", "data"]);
	return { url, timeoutMs, ...(token === undefined ? {} : { token }) };
}

async function live(options: ClientOptions): Promise<void> {
	const to = connection(options);
	const { url, timeoutMs } = to;
	const { stdout } = process;
	const samples: Sample[] = [];
	let trouble = "";
	const stop = new AbortController();
	const end = () => stop.abort();
	const draw = () => {
		// A serial console says 0 of both.
		const [columns, rows] = [stdout.columns || 80, stdout.rows || 24];
		const lines = drawStatus(url, samples, trouble, { columns, rows });
		stdout.write(`\x1b[H${lines.map((line) => `${line}\x1b[K`).join("\n")}\x1b[J`);
	};
	const leave = () => stdout.write(LEAVE);
	// A first answer, or an error as of any command.
	let client: Client | undefined = await Client.connect(to);
	process.once("SIGINT", end).once("SIGTERM", end).once("exit", leave);
	stdout.on("resize", draw);
	stdout.write(ENTER);
	try {
		while (!stop.signal.aborted) {
			const began = performance.now();
			try {
				client ??= await Client.connect({ ...to, signal: stop.signal });
				const now: Status = await client.status({ timeoutMs, signal: stop.signal });
				const last = samples.at(-1)?.status;
				if (
					last !== undefined &&
					(last.pid !== now.pid || Number(now.lookups) < Number(last.lookups))
				) {
					samples.length = 0; // another server
				}
				samples.push({ at: performance.now() / 1e3, status: now });
				samples.splice(0, samples.length - KEPT);
				trouble = "";
			} catch (error) {
				if (stop.signal.aborted) {
					break;
				}
				trouble = (error as Error).message;
				await client?.close({ timeoutMs }).catch(() => {});
				client = undefined;
			}
			draw();
			await sleep(PERIOD_MS - (performance.now() - began), stop.signal);
		}
	} finally {
		stdout.off("resize", draw);
		process.off("SIGINT", end).off("SIGTERM", end).off("exit", leave);
		leave();
		await client?.close({ timeoutMs }).catch(() => {});
	}
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
	return new Promise((resolve) => {
		const timer = setTimeout(resolve, Math.max(0, ms));
		signal.addEventListener("abort", () => {
			clearTimeout(timer);
			resolve();
		});
	});
}
