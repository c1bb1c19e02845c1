import { checkText, invalid } from "./arguments.js";
import { wrap } from "./errors.js";
import { native } from "./native.js";

/** What a server that asks for a token is shown. */
export interface TokenOptions {
	/** The token itself, 1 to 255 bytes. Default: `KVFERRY_TOKEN` of the environment, else none. */
	readonly token?: string | undefined;
	/** Instead: a file that has it on a line `data = TOKEN`, and that only its owner may read. */
	readonly tokenFile?: string | undefined;
}

/**
 * The token to show, of a file the first that it has of `roles`; undefined for none.
 *
 * @internal
 */
export function tokenOf(
	{ token, tokenFile }: TokenOptions,
	roles: readonly ("data" | "admin")[] = ["data"],
): string | undefined {
	if (tokenFile !== undefined) {
		checkText("tokenFile", tokenFile);
		if (token !== undefined) {
			throw invalid("token and tokenFile are both given; leave one of them out");
		}
		return wrap(() => native().readToken(tokenFile, [...roles]));
	}
	if (token !== undefined) {
		checkText("token", token);
		return token;
	}
	return process.env.KVFERRY_TOKEN || undefined;
}
