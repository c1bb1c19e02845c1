// `kvferry serve` as a child process, for the demo and the benchmarks.

import { spawn } from "node:child_process";
import { join } from "node:path";
import { fail, root } from "./setup.mjs";

/**
 * Starts the built server on a port that the system chooses, with a pool of 1 GiB.
 *
 * @param {string} shmName Name of the pool.
 * @returns {Promise<{ url: string, end: () => Promise<void> }>}
 */
export async function startServer(shmName) {
	const child = spawn(
		process.execPath,
		[
			join(root, "dist", "cli", "main.js"),
			...[
				"serve",
				"--port",
				"0",
				"--http-port",
				"off",
				"--memory",
				"1GiB",
				"--shm-name",
				shmName,
				"--json",
			],
		],
		{ stdio: ["ignore", "pipe", "inherit"] },
	);
	const ended = new Promise((resolve) => child.once("close", resolve));
	const kill = () => child.kill();
	process.once("exit", kill); // whatever ends us
	const line = await new Promise((resolve) => {
		let output = "";
		child.stdout.setEncoding("utf8").on("data", (text) => {
			output += text;
			if (output.includes("\n")) {
				resolve(output);
			}
		});
		child.once("close", () => resolve(""));
	});
	if (line === "") {
		fail("kvferry serve ended before it was ready; its reason is above.");
	}
	const { url } = JSON.parse(line);
	return {
		url,
		end: async () => {
			kill();
			await ended;
			process.off("exit", kill);
		},
	};
}
