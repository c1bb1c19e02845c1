// Formatting, lints, types, licences and the API reference: everything that needs no test run.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { buildAddon, buildJavaScript } from "./build.mjs";
import { installEngine } from "./engine.mjs";
import { checkLicences } from "./licences.mjs";
import { installOnnx, skipped } from "./onnx.mjs";
import { capture, run, setup, step } from "./setup.mjs";

setup();
step("cargo fmt");
run("cargo", ["fmt", "--all", "--check"]);
step("cargo clippy");
run("cargo", [
	...["clippy", "--workspace", "--all-targets", "--locked", "--quiet"],
	...["--", "-D", "warnings"],
]);
checkArm();
step("licences");
checkLicences();
buildAddon(); // both write declarations that the types below rest on
buildJavaScript();
step("biome");
run("biome", ["check", "--error-on-warnings"]);
step("tsc");
run("tsc", ["--project", "."]);
installEngine();
run("tsc", ["--project", "examples/llama-chat"]); // kvferry's types against the engine's own
try {
	installOnnx();
	run("tsc", ["--project", "examples/onnx-chat"]);
} catch (error) {
	skipped("the types of onnxruntime-node", error);
}
step("typedoc");
run("typedoc", []);
console.error("\nall checks passed");

/** What other processors have of their own is compiled, where Rust's library for them is there. */
function checkArm() {
	const target = "aarch64-unknown-linux-gnu";
	step(`cargo clippy for ${target}`);
	const sysroot = capture("rustc", ["--print", "sysroot"]).trim();
	if (!existsSync(join(sysroot, "lib", "rustlib", target))) {
		console.error(`SKIPPED: no library for it (rustup target add ${target})`);
		return;
	}
	const pure = ["--package", "kvferry-core", "--features", "blake3/pure"]; // need no C compiler for it
	run("cargo", [
		...[
			"clippy",
			"--target",
			target,
			"--package",
			"kvferry-node",
			"--no-default-features",
			...pure,
		],
		...["--locked", "--quiet", "--", "-D", "warnings"],
	]);
}
