// What the check of one case may say besides `true` and `false`.

/** Any JSON value. @typedef {any} Json */
/** @typedef {boolean | typeof UNREACHABLE | { [EXCUSED]: string }} Outcome */
/** A part of a file: its name, its cases, and the check of one. @typedef {[string, Json[], (item: Json) => Outcome]} Section */
/** The sections of a file's data; `undefined` when it is of another schema. @typedef {(data: Json, kvferry: typeof import("../../ts/index.js")) => Section[] | undefined} Schema */

export const UNREACHABLE = Symbol("no request can have it, so the package does not compute it");
/** Key of the defect of the original that the case shows, where ours gives the corrected result. */
export const EXCUSED = Symbol("defect of the original");
