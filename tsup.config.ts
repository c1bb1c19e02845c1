import { defineConfig } from "tsup";

export default defineConfig([
	{
		entry: {
			index: "ts/index.ts",
			"engines/llama-cpp": "ts/engines/llama-cpp.ts",
			"engines/onnx": "ts/engines/onnx.ts",
		},
		format: ["esm", "cjs"],
		dts: { banner: '/// <reference lib="esnext.disposable" />' }, // for targets that do not have it
		shims: true, // import.meta.url in the CommonJS build
		splitting: true,
		clean: true,
		target: "node20",
	},
	{
		entry: { "cli/main": "ts/cli/main.ts" },
		format: ["esm"],
		target: "node20",
	},
]);
