// Shows a run as it goes. Without this the page refreshes itself.
(function () {
  "use strict";
  var run = document.getElementById("run");
  if (!run || !run.dataset.refresh) return;
  var timer = setInterval(function () {
    if (document.hidden || run.contains(document.activeElement)) return;
    fetch(window.location.href, { credentials: "same-origin" })
      .then(function (answer) { return answer.ok ? answer.text() : Promise.reject(); })
      .then(function (text) {
        var fresh = new DOMParser().parseFromString(text, "text/html").getElementById("run");
        if (!fresh) return;
        run.innerHTML = fresh.innerHTML;
        if (!fresh.dataset.refresh) clearInterval(timer);
      })
      .catch(function () {});
  }, Number(run.dataset.refresh) * 1000);
})();
