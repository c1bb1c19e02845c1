// Brings a machine with only Node, Rust and pip to where the project builds and tests itself.
// Each step is skipped when it has already been done.

import { spawnSync } from "node:child_process";
import { copyFileSync, existsSync, readFileSync, statSync } from "node:fs";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";

export const root = fileURLToPath(new URL("..", import.meta.url));
export const cache = join(root, ".cache");

const venv = join(cache, "venv");
const venvBin = join(venv, "bin");
const NODE_FLOOR = "20.19.0";
const PIP_FLOOR = "22.3"; // has --python

/** Tools, npm packages and Python packages: all that the project's scripts rely on. */
export function setup() {
	requireNode();
	requireRust();
	installNpmPackages();
	if (process.platform !== "win32") {
		installPythonPackages(); // for linking on Linux, and for the tests
	}
}

/** Node at the floor of package.json. */
export function requireNode() {
	if (isOlder(process.versions.node, NODE_FLOOR)) {
		fail(
			`Node.js ${process.versions.node} is too old: kvferry needs ${NODE_FLOOR} or newer. ` +
				"Install it from https://nodejs.org.",
		);
	}
}

/** The Rust that Cargo.toml asks for. */
export function requireRust() {
	const manifest = readFileSync(join(root, "Cargo.toml"), "utf8");
	const floor = /^rust-version = "(.+)"/m.exec(manifest)?.[1] ?? "";
	const found = /^cargo (\d+\.\d+\.\d+)/.exec(capture("cargo", ["--version"]))?.[1];
	if (found === undefined) {
		fail(`cargo is not on the PATH: install Rust ${floor} or newer from https://rustup.rs.`);
	}
	if (isOlder(found, floor)) {
		fail(`Rust ${found} is too old: kvferry needs ${floor} or newer. Run: rustup update stable`);
	}
}

/** `npm ci`, unless node_modules already follows package-lock.json. */
export function installNpmPackages() {
	const installed = join(root, "node_modules", ".package-lock.json");
	const wanted = join(root, "package-lock.json");
	if (!existsSync(installed) || statSync(installed).mtimeMs < statSync(wanted).mtimeMs) {
		step("npm ci");
		run("npm", ["ci", "--no-audit", "--no-fund"]);
	}
}

/**
 * The packages of scripts/requirements.txt in .cache/venv. Made without the ensurepip module,
 * which Debian ships apart from Python and pip.
 */
export function installPythonPackages() {
	const wanted = join(root, "scripts", "requirements.txt");
	const installed = join(venv, "requirements.txt");
	if (existsSync(installed) && readFileSync(installed).equals(readFileSync(wanted))) {
		return;
	}
	const env = machineEnvironment();
	const pip = /^pip (\S+)/.exec(capture("python3", ["-m", "pip", "--version"], env))?.[1];
	if (pip === undefined) {
		fail("Python 3 with pip is missing: install both (Debian: apt-get install python3-pip).");
	}
	if (isOlder(pip, PIP_FLOOR)) {
		fail(
			`pip ${pip} is too old: kvferry needs ${PIP_FLOOR} or newer. ` +
				"Run: python3 -m pip install --upgrade pip",
		);
	}
	step("Python packages into .cache/venv");
	run("python3", ["-m", "venv", "--clear", "--without-pip", venv], { env });
	const intoVenv = ["-m", "pip", "--python", join(venvBin, "python")];
	const quietly = ["--quiet", "--disable-pip-version-check"];
	run("python3", [...intoVenv, "install", ...quietly, "-r", wanted], { env });
	copyFileSync(wanted, installed);
}

/** The environment with the machine's own python3, which has pip, and not the venv's. */
export function machineEnvironment() {
	const path = (process.env.PATH ?? "").split(delimiter).filter((bin) => bin !== venvBin);
	return { ...process.env, PATH: path.join(delimiter) };
}

/** The environment with the venv's and npm's programs first on the PATH. */
export function toolEnvironment() {
	const bins = [venvBin, join(root, "node_modules", ".bin")];
	return { ...process.env, PATH: [...bins, process.env.PATH].join(delimiter) };
}

/** Tells what runs next. */
export function step(/** @type {string} */ what) {
	console.error(`\n▸ ${what}`);
}

/** Runs a program, with stderr for all that it prints, and ends with its exit code where it fails. */
export function run(
	/** @type {string} */ command,
	/** @type {string[]} */ args,
	/** @type {import("node:child_process").SpawnSyncOptions} */ options = {},
) {
	const spawned = {
		cwd: root,
		stdio: /** @type {import("node:child_process").StdioOptions} */ (["inherit", 2, "inherit"]), // stdout is for results
		env: toolEnvironment(),
		shell: process.platform === "win32", // npm's programs are batch files there
	};
	const { status, error } = spawnSync(command, args, { ...spawned, ...options });
	if (status !== 0) {
		fail(
			`${command} ${args.join(" ")}: ${error?.message ?? `failed with exit code ${status}`}`,
			status,
		);
	}
}

/** What a program prints; empty where it is missing or fails. */
export function capture(
	/** @type {string} */ command,
	/** @type {string[]} */ args,
	/** @type {NodeJS.ProcessEnv} */ env = toolEnvironment(),
) {
	const spawned = { cwd: root, env, maxBuffer: 64 << 20 };
	const { status, stdout } = spawnSync(command, args, { ...spawned, encoding: "utf8" });
	return status === 0 ? stdout : "";
}

/**
 * Ends the process with a message for a person.
 *
 * @returns {never}
 */
export function fail(/** @type {string} */ message, /** @type {number | null} */ code = 1) {
	console.error(`\nerror: ${message}`);
	process.exit(code ?? 1);
}

function isOlder(/** @type {string} */ version, /** @type {string} */ floor) {
	const [left, right] = [version, floor].map((text) => text.split(".").map(Number));
	for (const [i, wanted] of (right ?? []).entries()) {
		const found = left?.[i] ?? 0;
		if (found !== wanted) {
			return found < wanted;
		}
	}
	return false;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	setup();
}
