export { h, render } from "preact";
export { useEffect, useId, useRef, useState } from "preact/hooks";
export { computed, signal } from "@preact/signals";
export { default as htm } from "htm";
