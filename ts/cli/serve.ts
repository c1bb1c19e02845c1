import { KvferryError } from "../errors.js";
import { Server } from "../server.js";
import { Log } from "./log.js";
import { serveOptions } from "./options.js";
import { SERVE, settingsJson, settingsTable } from "./settings.js";
import { isLoopback } from "./values.js";

/** What the log's reader has not taken this long after the last line, it never gets: the process ends. */
const LAST_LINES_MS = 1000;
/** A signal that comes again sooner is the same one: npx hands on what the terminal has sent to all. */
const AGAIN_MS = 1000;

/** `kvferry serve`: runs a server until SIGINT, SIGTERM or SIGHUP. */
export async function serve(args: string[]): Promise<void> {
	const { found, settings, printConfig, json } = serveOptions(args);
	if (printConfig) {
		process.stdout.write(
			json ? `${JSON.stringify(settingsJson(SERVE, found))}\n` : settingsTable(SERVE, found),
		);
		return;
	}
	const { log: format = "text", diskSize, ...options } = settings;
	const ofDisk = options.disk === undefined || diskSize === undefined ? {} : { diskSize };
	const log = new Log(format);
	let server: Server;
	try {
		server = await Server.start({ ...options, ...ofDisk });
	} catch (error) {
		if (format !== "json" || json) {
			throw error;
		}
		// Who collects lines of JSON gets one.
		log.write({ level: "error", event: "start_failed", detail: told(error), count: 1 });
		process.exitCode = 1;
		return;
	}
	const stop = stopSignal(); // before anybody is told that it runs
	// Whoever started it may read no further, or have no room for it: the server goes on.
	process.stdout.removeAllListeners("error").on("error", () => {});
	const { shmName, httpAddress } = server;
	const url = `tcp://${server.address}`;
	const http = httpAddress === undefined ? {} : { httpUrl: `http://${httpAddress}` };
	const { memory, ipc } = options;
	const socket = ipc === undefined ? {} : { ipcUrl: `ipc://${ipc}` };
	process.stdout.write(
		json
			? `${JSON.stringify({ url, shmName, memory, ...http, ...socket })}\n`
			: `kvferry serves ${url} from pool ${shmName} of ${memory} bytes\n`,
	);
	if (!json && socket.ipcUrl !== undefined) {
		process.stdout.write(`and ${socket.ipcUrl}\n`);
	}
	if (!json && http.httpUrl !== undefined) {
		process.stdout.write(`its page, health and metrics: ${http.httpUrl}\n`);
	}
	log.info("started", `process ${process.pid} serves ${url}`);
	if (options.listenPublic && isLoopback(options.host ?? "")) {
		const detail = `--listen-public changes nothing at ${options.host}: give --host ADDRESS, too`;
		log.write({ level: "warn", event: "not_public", detail, count: 1 });
	}
	log.follow(server);
	const signal = await stop;
	log.end();
	log.info(
		"stopping",
		`${signal}; what is not on the disk yet is written, for 30 s at most; SIGINT or SIGTERM once more ends it at once`,
	);
	await server.close();
	log.info("stopped", `process ${process.pid}`);
	// Lines that nobody reads would keep the process; without any it ends by itself, and sooner.
	setTimeout(() => process.exit(), LAST_LINES_MS).unref();
}

/** An error as it is told on stderr. */
function told(error: unknown): string {
	return error instanceof KvferryError ? `${error.code}: ${error.message}` : String(error);
}

/** The signal that ends the server. SIGINT or SIGTERM once more ends the process, with what is not written yet. */
function stopSignal(): Promise<NodeJS.Signals> {
	return new Promise((resolve) => {
		let first: number | undefined;
		const stop = (signal: NodeJS.Signals) => {
			if (first === undefined) {
				first = performance.now();
				resolve(signal);
			} else if (signal !== "SIGHUP" && performance.now() - first > AGAIN_MS) {
				process.off(signal, stop);
				process.kill(process.pid, signal);
			}
		};
		// A terminal that closes sends SIGHUP, and its shell another.
		process.on("SIGINT", stop).on("SIGTERM", stop).on("SIGHUP", stop);
	});
}
