// What is wrong with a page that is open, as tests/test_browser.py asks.
() => {
const withoutWords = () => [
    ...[...document.images].filter(e => !e.alt.trim()),
    ...[...document.querySelectorAll('svg')].filter(e => {
        const spoken = e.closest('a, button, label, summary');  // an icon beside words that say it
        const named = spoken && (spoken.textContent.trim() || spoken.ariaLabel || spoken.title
            || spoken.control?.ariaLabel);
        const read = e.getAttribute('role') === 'img' && (e.ariaLabel || '').trim();
        return e.checkVisibility() && !named && !read && !e.closest('[aria-hidden="true"]');
    }),
].map(e => e.outerHTML.slice(0, 120));

const withoutNames = () => [...document.querySelectorAll('table')].filter(table => {
    const head = table.tHead;
    if (!table.checkVisibility()) return false;
    if (!head || head.checkVisibility() && getComputedStyle(head).display !== 'none') return false;
    const named = cell => cell.dataset.label || cell.textContent.trim() === '' || cell.colSpan > 1;
    return [...table.tBodies].some(body => [...body.rows].some(row => {
        const cells = [...row.cells].filter(cell => cell.tagName === 'TD');
        return cells.length > 2 && !cells.slice(1).every(named);
    }));
}).map(table => table.outerHTML.slice(0, 300));

const faint = () => {
    const parse = text => {
        const canvas = parse.canvas ||= document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = '#000'; canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, below) => {
        const [r, g, b, a] = top;
        return [r, g, b].map((each, i) => each * a + below[i] * (1 - a));
    };
    const light = rgb => rgb.map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            layers.unshift(colour);
            if (colour[3] === 1) break;
        }
        const dark = matchMedia('(prefers-color-scheme: dark)').matches && !matchMedia('print').matches;
        return layers.reduce((below, top) => over(top, below), dark ? [18, 18, 18] : [255, 255, 255]);
    };
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const element = walk.currentNode.parentElement;
        const skipped = !walk.currentNode.data.trim() || element.closest('script, style, title, [aria-hidden="true"]');
        if (skipped || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        const style = getComputedStyle(element), drawn = element.closest('svg');
        const ground = behind(drawn ? drawn.parentElement : element);
        const ink = over(parse(drawn ? style.fill : style.color), ground);
        const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
        const large = size >= 24 || size >= 18.66 && Number(style.fontWeight) >= 700;
        if (ratio < (large ? 3 : 4.5)) {
            found.push(`${ratio.toFixed(2)} ${element.tagName}.${element.className}: ${walk.currentNode.data.trim().slice(0, 60)}`);
        }
    }
    return [...new Set(found)].slice(0, 20);
};

const scrolled = document.scrollingElement;
return {
    "wider than the window by": scrolled.scrollWidth - scrolled.clientWidth,
    "pictures without words": withoutWords(),
    "columns without names": withoutNames(),
    "faint": faint(),
};
}
