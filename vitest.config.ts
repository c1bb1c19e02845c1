import { defineConfig } from "vitest/config";

export default defineConfig({
	test: {
		include: ["test/**/*.test.ts"],
		pool: "forks", // a native crash ends one file, not the run
		testTimeout: 30_000,
		hookTimeout: 60_000,
	},
});
