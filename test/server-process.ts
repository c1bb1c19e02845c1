import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setImmediate } from "node:timers/promises";
import { fileURLToPath } from "node:url";

const CLI = fileURLToPath(new URL("../dist/cli/main.js", import.meta.url));

/** Stops a process, and waits until each of its threads has stopped. */
export async function stopProcess(child: ChildProcess): Promise<void> {
	child.kill("SIGSTOP");
	const tasks = `/proc/${child.pid}/task`;
	const running = (task: string) =>
		!/^State:\tT/m.test(readFileSync(`${tasks}/${task}/status`, "utf8"));
	while (readdirSync(tasks).some(running)) {
		await setImmediate();
	}
}

/** A `kvferry serve` of its own, on a free port. */
export class ServerProcess implements AsyncDisposable {
	readonly process: ChildProcess;
	readonly url: string;
	readonly shmName: string;
	readonly #exited: Promise<unknown>;

	private constructor(child: ChildProcess, url: string, shmName: string) {
		this.process = child;
		this.url = url;
		this.shmName = shmName;
		this.#exited = child.exitCode === null ? once(child, "exit") : Promise.resolve();
	}

	/** Starts `kvferry serve` and waits until it listens. */
	static start(...args: string[]): Promise<ServerProcess> {
		const port = args.includes("--port") ? [] : ["--port", "0"];
		const http = args.includes("--http-port") ? [] : ["--http-port", "off"];
		const memory = args.includes("--memory") ? [] : ["--memory", "64MiB"];
		return ServerProcess.run(CLI, "serve", "--json", ...port, ...http, ...memory, ...args);
	}

	/** Starts a script that prints its server's url and pool, and waits until it did. */
	static async run(script: string, ...args: string[]): Promise<ServerProcess> {
		const child = spawn(process.execPath, [script, ...args], { stdio: ["ignore", "pipe", "pipe"] });
		let errors = "";
		child.stderr.setEncoding("utf8").on("data", (text: string) => {
			errors += text;
		});
		const exited = once(child, "exit").then(([code]: (number | null)[]) => {
			throw new Error(`the server ended with ${code}: ${errors}`);
		});
		const lines = createInterface({ input: child.stdout });
		const [line] = (await Promise.race([once(lines, "line"), exited])) as [string];
		exited.catch(() => {}); // it is meant to end some time
		const { url, shmName } = JSON.parse(line) as { url: string; shmName: string };
		return new ServerProcess(child, url, shmName);
	}

	/** The port it listens on. */
	get port(): string {
		return new URL(this.url).port;
	}

	/** Sends a signal without waiting for anything. */
	signal(signal: NodeJS.Signals): void {
		this.process.kill(signal);
	}

	/** Stops it in its tracks (SIGSTOP); `signal("SIGCONT")` lets it go on. */
	async stop(): Promise<void> {
		await stopProcess(this.process);
	}

	/** Ends it with SIGKILL and waits until it is gone. */
	async kill(): Promise<void> {
		this.process.kill("SIGKILL");
		await this.#exited;
	}

	async [Symbol.asyncDispose](): Promise<void> {
		this.process.kill("SIGCONT");
		this.process.kill("SIGTERM");
		await this.#exited;
	}
}
