// `node scripts/sanitize.mjs`: kvferry-copy's tests, where the unsafe code is, under AddressSanitizer, Valgrind and
// Miri. Each needs a tool that is not everybody's; where one is missing, a line says SKIPPED, what and why. Nothing
// is installed.

import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { fail, requireRust, root, run, step, toolEnvironment } from "./setup.mjs";

const TARGET = "x86_64-unknown-linux-gnu";
/** Cases of the property tests: these tools are 5 to 50 times slower. */
const CASES = { asan: "60", valgrind: "6" };
/** What counts resident pages, or starts servers thousands of times. */
const SKIPPED_TESTS = [
	"pages_that_were_not_touched_take_no_memory",
	"servers_that_start_at_once_do_not_take_each_other_for_live_or_stale",
];
/** What Miri can run: no shared memory, no vector instructions. */
const MIRI_TESTS = ["threads::", "private::"];
const PACKAGE = ["--package", "kvferry-copy", "--locked"];
const skip = SKIPPED_TESTS.flatMap((name) => ["--skip", name]);

requireRust();
if (process.platform !== "linux" || process.arch !== "x64") {
	console.log("SKIPPED sanitizers: they are set up for Linux on x64 only");
	process.exit(0);
}
const nightly = works("cargo", ["+nightly", "--version"]);

step("AddressSanitizer");
if (nightly) {
	const tests = ["--target", TARGET, "--lib", "--test", "host"];
	run(
		"cargo",
		["+nightly", "test", "--quiet", ...PACKAGE, ...tests, "--", ...skip],
		environment({
			RUSTFLAGS: "-Zsanitizer=address --cfg kvferry_sanitized",
			CARGO_TARGET_DIR: join(root, "target", "asan"),
			KVFERRY_HOST_CASES: CASES.asan,
		}),
	);
} else {
	console.log("SKIPPED AddressSanitizer: no nightly toolchain (rustup toolchain install nightly)");
}

step("Valgrind");
if (works("valgrind", ["--version"])) {
	for (const binary of testBinaries()) {
		const options = ["--quiet", "--error-exitcode=9", "--fair-sched=yes"];
		const cases = environment({ KVFERRY_HOST_CASES: CASES.valgrind });
		run("valgrind", [...options, binary, "--quiet", ...skip], cases);
	}
} else {
	console.log("SKIPPED Valgrind: it is not installed (your distribution's package valgrind)");
}

step("Miri");
if (nightly && works("cargo", ["+nightly", "miri", "--version"])) {
	const options = ["--", ...MIRI_TESTS, ...skip];
	run(
		"cargo",
		["+nightly", "miri", "test", "--quiet", ...PACKAGE, "--lib", ...options],
		environment({
			MIRIFLAGS: "-Zmiri-disable-isolation -Zmiri-ignore-leaks", // the process's own threads live on
			CARGO_TARGET_DIR: join(root, "target", "miri"),
		}),
	);
} else {
	console.log("SKIPPED Miri: not installed (rustup +nightly component add miri rust-src)");
}

/** What a program finds beside the usual. */
function environment(/** @type {Record<string, string>} */ variables) {
	return { env: { ...toolEnvironment(), ...variables } };
}

function works(/** @type {string} */ command, /** @type {string[]} */ args) {
	return spawnSync(command, args, { cwd: root, stdio: "ignore" }).status === 0;
}

/** Builds the tests, and says where they are. @returns {string[]} */
function testBinaries() {
	const args = ["test", ...PACKAGE, "--lib", "--test", "host", "--no-run", "--message-format=json"];
	const built = spawnSync("cargo", args, {
		cwd: root,
		encoding: "utf8",
		maxBuffer: 64 << 20,
		stdio: ["ignore", "pipe", "inherit"],
	});
	if (built.status !== 0) {
		fail("the tests do not build");
	}
	return built.stdout
		.split("\n")
		.filter((line) => line.startsWith("{"))
		.map((line) => JSON.parse(line))
		.filter((message) => message.reason === "compiler-artifact" && message.executable)
		.map((message) => message.executable);
}
